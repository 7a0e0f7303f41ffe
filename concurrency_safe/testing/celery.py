"""pytest-celery on processes of this machine instead of Docker containers: its API, your app, real workers.

    # conftest.py
    pytest_plugins = ["concurrency_safe.testing.celery"]

    @pytest.fixture
    def celery_worker_app() -> str:
        return "project.celery"  # what `celery -A` takes

    # test_tasks.py
    def test_withdraw(celery_setup):
        sent = celery_setup.app.send_task("bank.withdraw", (7, 60))
        assert sent.get(timeout=10) is True
        celery_setup.worker.kill()  # SIGKILL
        celery_setup.worker.restart()

The broker and the results are on a Valkey server of the test's own. The worker has this process's environment, with
CELERY_BROKER_URL and CELERY_RESULT_BACKEND (which Celery prefers to the app's settings), and a DATABASE_URL unless
there is one. Needs `pip install pytest-celery`.
"""

from __future__ import annotations

import os
import signal as signals
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestContainer,
    CeleryTestWorker,
)

from concurrency_safe.testing.process import ServerError, SupervisedProcess
from concurrency_safe.testing.server import LOG_LINES, START_LIMIT
from concurrency_safe.testing.shared import postgres_dsn
from concurrency_safe.testing.valkey import ValkeyServer

if TYPE_CHECKING:
    from celery import Celery

#: Seconds between two looks at a worker's log.
LOOK_PERIOD = 0.02
#: The task that `celery_setup.ready(ping=True)` sends.
PING = "pytest_celery.vendors.worker.tasks"


class Local(CeleryTestContainer):  # type: ignore[misc]  # pytest-celery is untyped
    """What stands for a container: no Docker object is behind it."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def id(self) -> str:
        """Its name, too."""
        return self._name

    def reload(self) -> None:
        """Do nothing: the state is always fresh."""


class LocalValkey(Local):
    """A Valkey server, spoken to as pytest-celery speaks to a container."""

    def __init__(self, server: ValkeyServer) -> None:
        super().__init__(f"valkey-{server.port}")
        self.server = server

    @property
    def status(self) -> str:
        """As Docker says it."""
        return "running" if self.server.running else "exited"

    @property
    def celeryconfig(self) -> dict[str, str]:
        """The address, for workers and for tests."""
        return {"url": self.server.url, "host_url": self.server.url}

    def ready(self) -> bool:
        """Tell whether it accepts connections: when it has started, it does."""
        return self.server.running

    def logs(self) -> str:
        """Return all output."""
        return self.server.log.read_text(errors="replace")

    def kill(self, signal: str | int | None = None) -> None:  # noqa: ARG002 - pytest-celery passes it
        """Kill it as a crash does."""
        self.server.kill()

    def restart(self, timeout: float | None = None) -> None:  # noqa: ARG002 - pytest-celery passes it
        """Start it again; what it stored is lost."""
        if self.server.running:
            self.server.kill()
        self.server.start()


class LocalWorker(Local):
    """A worker process that can't outlive the test, spoken to as pytest-celery speaks to a container."""

    def __init__(self, app: str, options: list[str], environment: dict[str, str]) -> None:
        self._process = SupervisedProcess("concurrency_safe-worker")
        super().__init__(self._process.scratch.name[-12:])
        paths = [os.getcwd(), *filter(None, sys.path)]  # noqa: PTH109 - as text
        self._environment = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
        self._command = [sys.executable, "-m", "celery", "--workdir", paths[0], "-A", app, "worker"]
        self._command += ["-n", f"{self.worker_name()}@{self.id}", "--loglevel", "INFO", "-I", PING, *options]
        self._launch()

    @classmethod
    def worker_name(cls) -> str:
        """Return the part of the node's name before the @."""
        return "worker"

    @classmethod
    def worker_queue(cls) -> str:
        """Return the queue that a ping goes to."""
        return "celery"

    @property
    def status(self) -> str:
        """As Docker says it."""
        return "exited" if self._process.wait(0) else "running"

    def ready(self) -> bool:
        """Wait until the worker takes tasks.

        Raises: ServerError: it ended, or took too long.
        """
        until = time.monotonic() + START_LIMIT
        while " ready." not in self.logs()[self._seen :]:
            if self._process.wait(LOOK_PERIOD) or time.monotonic() > until:
                tail = "\n".join(self.logs().splitlines()[-LOG_LINES:])
                raise ServerError(f"the worker {self.name} did not start:\n{tail}")
        return True

    def logs(self) -> str:
        """Return all output, of every start."""
        return self._process.log.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal, and wait for the worker's end and its children's."""
        self._process.signal(signals.Signals[signal] if isinstance(signal, str) else signal)
        if not self._process.wait(START_LIMIT):
            raise ServerError(f"the worker {self.name} did not end {START_LIMIT:g} s after {signal}")

    def restart(self, timeout: float | None = None) -> None:  # noqa: ARG002 - pytest-celery passes it
        """Start it again, after a warm shutdown when it runs."""
        if self.status == "running":
            self.kill("SIGTERM")
        self._launch()
        self.ready()

    def teardown(self) -> None:
        """End it, by force when it has not ended after some seconds."""
        self._process.close()

    def _launch(self) -> None:
        self._seen = len(self.logs())
        self._process.spawn(self._command, env=self._environment)


@pytest.fixture
def celery_worker_app() -> str:
    """Name the app, as `celery -A` takes it; override this."""
    raise ServerError("which app? Override the fixture celery_worker_app: return what `celery -A` takes")


@pytest.fixture
def celery_worker_options() -> list[str]:
    """Give further options of `celery worker`; override this."""
    return ["--concurrency", "2"]


@pytest.fixture
def celery_valkey() -> Iterator[LocalValkey]:
    """Start a server for the broker and the results."""
    with ValkeyServer() as server:
        yield LocalValkey(server)


@pytest.fixture
def celery_broker(celery_valkey: LocalValkey) -> CeleryTestBroker:
    """Replace pytest-celery's brokers."""
    return CeleryTestBroker(celery_valkey)


@pytest.fixture
def celery_backend(celery_valkey: LocalValkey) -> CeleryTestBackend:
    """Replace pytest-celery's result backends."""
    return CeleryTestBackend(celery_valkey)


@pytest.fixture
def celery_worker(
    celery_worker_app: str,
    celery_worker_options: list[str],
    celery_broker_cluster: CeleryBrokerCluster,
    celery_backend_cluster: CeleryBackendCluster,
    celery_setup_app: Celery,
) -> Iterator[CeleryTestWorker]:
    """Start a worker of the app; it has ended when the test is over."""
    environment: dict[str, Any] = {
        "DATABASE_URL": postgres_dsn(),
        **os.environ,
        "CELERY_BROKER_URL": celery_broker_cluster.config()["urls"][0],
        "CELERY_RESULT_BACKEND": celery_backend_cluster.config()["urls"][0],
    }
    container = LocalWorker(celery_worker_app, celery_worker_options, environment)
    try:
        container.ready()
        yield CeleryTestWorker(container, celery_setup_app)
    finally:
        container.teardown()
