"""Real workers on a real broker, and the interval log that judges them."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery.result import AsyncResult
from psycopg import sql

from concurrency_safe.testing import broker_url, postgres_dsn
from tests.integration.conftest import LockStore, Rival, db_name, dsn, fresh_library, rival, store, wait_for

__all__ = ["db_name", "dsn", "fresh_library", "rival", "store"]  # fixtures, for the tests of this folder

# Before the app is imported: it reads its broker's address once.
os.environ["TESTS_BROKER_URL"] = broker_url()

from tests.contrib.celery_tasks import BROKER, app

#: Where the system has it: a worker ends also when the test run is killed.
TETHER = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []

OVERLAPS = """
SELECT count(*) FROM intervals a JOIN intervals b ON a.task = b.task AND a.ctid < b.ctid
   AND (a.key = b.key) = %s AND tstzrange(a.started, a.ended) && tstzrange(b.started, b.ended)
 WHERE a.task = %s
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the workers said last, when a test with workers fails."""
    report = yield
    for name, fixture in getattr(item, "funcargs", {}).items() if report.failed else ():
        if isinstance(fixture, Fleet):
            report.sections.append((f"the end of the logs of {name}", fixture.logs()[-8000:]))
    return report


class Fleet:
    """Worker processes of some framework, and the database that they share with the test."""

    def __init__(self, dsn: str, log_dir: Path) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"},
            "DATABASE_URL": dsn,
        }
        self.log_dir = log_dir
        self.started: list[subprocess.Popen[bytes]] = []
        self.store = LockStore(dsn)
        self.rival = Rival(dsn)
        self.store.connection.execute(
            "CREATE TABLE IF NOT EXISTS intervals (task text, key text, started timestamptz, ended timestamptz);"
            "CREATE TABLE IF NOT EXISTS gate ()"
        )

    def stay_unmeasured(self) -> None:
        """Keep coverage out of the workers: interrupted in its own bookkeeping, it never frees the lock of that."""
        self.environment |= {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}

    def launch(self, name: str, command: list[str], ready: str) -> subprocess.Popen[bytes]:
        """Start a worker; wait until it says in its log that it is `ready`."""
        log_file = self.log_dir / f"{name}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*TETHER, *command], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        self.started.append(process)
        wait_for(lambda: process.poll() is not None or ready in log_file.read_text(), 30)
        assert process.poll() is None, self.logs()
        return process

    def count(self, query: str, *params: object) -> int:
        row = self.store.connection.execute(query, params).fetchone()
        assert row
        return int(row[0])

    def now(self) -> dt.datetime:
        """Give the time of the interval log."""
        row = self.store.connection.execute("SELECT clock_timestamp()").fetchone()
        assert row
        now: dt.datetime = row[0]
        return now

    def runs(self, task: str) -> int:
        return self.count("SELECT count(*) FROM intervals WHERE task = %s", task)

    def keys(self, task: str) -> list[str]:
        """Give what the runs of `task` noted, in order."""
        query = "SELECT key FROM intervals WHERE task = %s ORDER BY started"
        return [key for (key,) in self.store.connection.execute(query, [task])]

    def overlaps(self, task: str, *, same_key: bool) -> int:
        """Count the pairs of runs of `task` that were under way at one time, with one key or with different ones."""
        return self.count(OVERLAPS, same_key, task)

    def clear(self) -> None:
        self.store.connection.execute("TRUNCATE intervals")

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.log_dir.glob("*.log")))

    @contextlib.contextmanager
    def closed_gate(self) -> Iterator[None]:
        """Keep the bodies of `at_gate` waiting for as long as the block lasts."""
        with psycopg.connect(self.store.dsn) as connection:
            connection.execute("LOCK TABLE gate IN EXCLUSIVE MODE")
            yield

    def end(self) -> list[int]:
        """End the workers in good order, by force when that fails; give their exit statuses."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [process.returncode for process in self.started]

    def stop(self) -> None:
        self.end()
        self.store.connection.close()
        self.rival.connection.close()


class Workers(Fleet):
    """Celery's."""

    def __init__(self, dsn: str, log_dir: Path, broker: str = BROKER) -> None:
        super().__init__(dsn, log_dir)
        self.broker = broker
        self.connection = app.connection_for_write(broker)
        self.queue = f"tests_{uuid.uuid4().hex[:8]}"
        self.environment |= {"CELERY_QUEUE": self.queue, "TESTS_BROKER_URL": broker, "TESTS_RESULT_URL": BROKER}
        self.environment["C_FORCE_ROOT"] = "1"  # root may take pickled messages, here
        self.use()

    def use(self) -> None:
        """Let what this process sends go to these workers."""
        app.conf.task_default_queue = self.queue

    def start(self, concurrency: int = 4, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a worker; wait until it takes tasks."""
        name = f"w{len(self.started)}-{uuid.uuid4().hex[:6]}@test"
        command = [sys.executable, "-m", "celery", "-A", "tests.contrib.celery_tasks", "worker", "-n", name]
        command += ["-c", str(concurrency), "--loglevel", "INFO", "--without-gossip", "--without-mingle", *arguments]
        return self.launch(name, command, f"{name} ready.")

    def children(self) -> set[str]:
        """Give the pids of the last worker's pool."""
        pid = self.started[-1].pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def send(self, task: Any, *args: object, **options: object) -> AsyncResult[Any]:
        """Send a task by these workers' own broker."""
        result: AsyncResult[Any] = task.apply_async(args, connection=self.connection, **options)
        return result

    def stop(self) -> None:
        super().stop()
        self.connection.release()


@contextlib.contextmanager
def new_database() -> Iterator[str]:
    """Make a database of the workers' own, beside Django's test database; give its URL."""
    server = psycopg.connect(postgres_dsn(), autocommit=True)
    info = server.info
    name = f"workers_{uuid.uuid4().hex[:8]}"
    server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield f"postgresql://{info.user}:{info.password}@{info.host}:{info.port}/{name}"
    server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
    server.close()


@pytest.fixture(scope="session")
def worker_database() -> Iterator[str]:
    with new_database() as dsn:
        yield dsn


@pytest.fixture
def own_fleet(tmp_path: Path) -> Iterator[Workers]:
    """Give workers yet to be started, in a database that nobody else uses; nothing is held after their end."""
    with new_database() as dsn:
        own = Workers(dsn, tmp_path)
        try:
            yield own
        finally:
            own.stop()


@pytest.fixture(scope="session")
def workers(worker_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers with four processes each, as two hosts would have them."""
    both = Workers(worker_database, tmp_path_factory.mktemp("workers"))
    both.start()
    both.start()
    yield both
    both.stop()


@pytest.fixture
def fleet(workers: Workers) -> Iterator[Workers]:
    """Give the workers, with an empty log; nothing is held when the test is over."""
    workers.use()
    workers.clear()
    yield workers
    workers.rival.let_go()
    wait_for(lambda: workers.store.rows() == 0)
