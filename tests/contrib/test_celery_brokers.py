"""Exclusion on each broker, acknowledged late and early. The interval log in the database is the judge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contrib import celery_tasks as tasks
from tests.contrib.conftest import Workers
from tests.servers.rabbitmq import needs_rabbitmq, rabbitmq_url

#: Runs of each task with one key.
TASKS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def rabbitmq_workers(worker_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers with four processes each on RabbitMQ."""
    both = Workers(worker_database, tmp_path_factory.mktemp("rabbitmq"), rabbitmq_url())
    try:
        both.start()
        both.start()
        yield both
    finally:
        both.stop()


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=needs_rabbitmq)])
def any_fleet(request: pytest.FixtureRequest) -> Workers:
    """Give workers on one broker after the other, with an empty log."""
    found = request.getfixturevalue("workers" if request.param == "redis" else "rabbitmq_workers")
    assert isinstance(found, Workers)
    found.use()
    found.clear()
    return found


def test_tasks_on_one_key_run_one_at_a_time_and_each_once(any_fleet: Workers) -> None:
    fleet = any_fleet
    guarded = (tasks.acked_late, tasks.acked_early)
    sent = [(number, fleet.send(task, "one", number)) for number in range(TASKS) for task in guarded]
    sent += [(number, fleet.send(task, "other", number)) for number in range(TASKS // 6) for task in guarded]
    control = [fleet.send(tasks.unguarded, "one") for _ in range(TASKS // 2)]

    for number, one in sent:
        assert one.get(timeout=60) == number
    for one in control:
        one.get(timeout=60)
    for task in guarded:
        assert fleet.runs(task.name) == TASKS + TASKS // 6
        assert fleet.overlaps(task.name, same_key=True) == 0
        assert fleet.overlaps(task.name, same_key=False) > 0
        assert any(task.name in line and "Retry in" in line for line in fleet.logs().splitlines())  # conflicts
    assert fleet.overlaps("unguarded", same_key=True) > 0
