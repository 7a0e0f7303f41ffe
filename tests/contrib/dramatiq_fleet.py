"""Real Dramatiq workers on a real broker, and what the tests send to them."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.composition import group, pipeline

from concurrency_safe.contrib.dramatiq import requeue
from concurrency_safe.testing import broker_url
from tests.contrib import dramatiq_actors
from tests.contrib.conftest import Fleet
from tests.integration.conftest import wait_for
from tests.servers.rabbitmq import needs_rabbitmq, rabbitmq_url

a_group: Any = group  # they have no types
a_pipeline: Any = pipeline

#: Milliseconds that a result may take; nothing may hang.
LIMIT = 30_000


def amqp_url() -> str:
    """Give RabbitMQ's address as pika takes it: the virtual host quoted."""
    return rabbitmq_url().removesuffix("//") + "/%2F"


class Workers(Fleet):
    """Dramatiq's."""

    def __init__(self, dsn: str, log_dir: Path, url: str | None = None) -> None:
        super().__init__(dsn, log_dir)
        self.url = url or broker_url()
        self.broker: Any = dramatiq_actors.connect(self.url) if url else dramatiq_actors.broker
        self.queue = f"tests_{uuid.uuid4().hex[:8]}"
        self.broker.confirm_delivery = True  # RabbitMQ keeps what it has confirmed
        self.broker.declare_queue(self.queue)
        self.environment |= {
            "DRAMATIQ_QUEUE": self.queue,
            "TESTS_BROKER_URL": self.url,
            "TESTS_RESULT_URL": broker_url(),
        }

    def start(
        self,
        processes: int = 2,
        threads: int = 4,
        *,
        program: str = "dramatiq",
        module: str = "tests.contrib.dramatiq_actors",
    ) -> subprocess.Popen[bytes]:
        """Start a worker; wait until it takes messages."""
        command = [sys.executable, "-m", program, module]
        command += ["--processes", str(processes), "--threads", str(threads), "--queues", self.queue]
        name = f"d{len(self.started)}-{uuid.uuid4().hex[:6]}"
        worker = self.launch(name, command, "ready for action")
        log = self.log_dir / f"{name}.log"
        wait_for(lambda: log.read_text().count("is ready for action") >= processes, 30)
        return worker

    def stop(self) -> None:
        super().stop()
        self.broker.close()
        if isinstance(self.broker, RedisBroker):
            self.broker.client.close()

    def message(self, actor: Any, *args: Any, **options: Any) -> dramatiq.Message[Any]:
        """Make a message for these workers; sent again, it is the same one, as a broker delivers it again."""
        options = {requeue.ENTRY: uuid.uuid4().hex, **options}
        made: dramatiq.Message[Any] = actor.message_with_options(args=args, **options).copy(queue_name=self.queue)
        return made

    def send(self, actor: Any, *args: Any, **options: Any) -> dramatiq.Message[Any]:
        message = self.message(actor, *args, **options)
        self.broker.enqueue(message)
        return message

    def result(self, message: dramatiq.Message[Any], limit: int = LIMIT) -> Any:
        return message.get_result(backend=dramatiq_actors.RESULTS, block=True, timeout=limit)

    def dead(self) -> int:
        """Count the dead letters."""
        if self.url.startswith("amqp"):
            del self.broker.connection  # it may have gone stale between two looks
            return int(self.broker.get_queue_message_counts(self.queue)[2])
        return int(self.broker.client.zcard(f"dramatiq:{self.queue}.XQ"))

    def queued(self) -> int:
        """Count the messages that wait, or are delivered and not acknowledged."""
        if self.url.startswith("amqp"):
            del self.broker.connection
            return sum(self.broker.get_queue_message_counts(self.queue)[:2])
        return int(self.broker.do_qsize(self.queue))


@pytest.fixture(scope="session")
def redis_workers(worker_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two processes with four threads each."""
    ours = Workers(worker_database, tmp_path_factory.mktemp("dramatiq"))
    try:
        ours.start()
        yield ours
    finally:
        ours.stop()


@pytest.fixture(scope="session")
def rabbitmq_workers(worker_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two processes with four threads each on RabbitMQ."""
    ours = Workers(worker_database, tmp_path_factory.mktemp("dramatiq_rabbitmq"), amqp_url())
    try:
        ours.start()
        yield ours
    finally:
        ours.stop()


def _fresh(found: Workers) -> Iterator[Workers]:
    found.clear()
    yield found
    found.rival.let_go()
    wait_for(lambda: found.store.rows() == 0 and found.queued() == 0)


@pytest.fixture
def crew(redis_workers: Workers) -> Iterator[Workers]:
    """Give the workers on Redis, with an empty log; nothing is held when the test is over."""
    yield from _fresh(redis_workers)


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=needs_rabbitmq)])
def any_crew(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """Give workers on one broker after the other."""
    yield from _fresh(request.getfixturevalue(f"{request.param}_workers"))
