"""How guarded tasks, workers and locks end before their time: revoked, shut down, out of time, cut off."""

from __future__ import annotations

import random
import signal

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError

from concurrency_safe import LockLost
from tests.contrib import celery_tasks as tasks
from tests.contrib.conftest import Workers
from tests.integration.conftest import wait_for

#: Seconds that a result may take.
LIMIT = 60

pytestmark = pytest.mark.timeout(180)


def test_a_revoked_task_frees_its_lock(fleet: Workers) -> None:
    with fleet.closed_gate():
        sent = tasks.at_gate.delay("a")
        wait_for(lambda: fleet.runs("at_gate") == 1)
        assert not fleet.rival.is_free("gate:a")

        tasks.app.control.revoke(sent.id, terminate=True)
        wait_for(lambda: fleet.rival.is_free("gate:a"), 2.0)
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=LIMIT)

    assert tasks.at_gate.delay("a").get(timeout=LIMIT) == "a"


def test_a_warm_shutdown_keeps_the_lock_until_the_body_has_ended(own_fleet: Workers) -> None:
    worker = own_fleet.start(1)
    with own_fleet.closed_gate():
        sent = tasks.at_gate.delay("a")
        wait_for(lambda: own_fleet.runs("at_gate") == 1)

        worker.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in own_fleet.logs())
        assert not own_fleet.rival.is_free("gate:a")

    assert worker.wait(20) == 0
    assert sent.get(timeout=LIMIT) == "a"
    wait_for(lambda: own_fleet.store.rows() == own_fleet.store.sessions() == 0)


def test_a_cold_shutdown_frees_the_lock_and_another_worker_completes_the_task(own_fleet: Workers) -> None:
    worker = own_fleet.start(1)
    with own_fleet.closed_gate():
        sent = tasks.at_gate.delay("a")
        wait_for(lambda: own_fleet.runs("at_gate") == 1)

        worker.send_signal(signal.SIGQUIT)
        worker.wait(20)
        wait_for(lambda: own_fleet.store.rows() == own_fleet.store.sessions() == 0, 2.0)
        own_fleet.start(1)
        wait_for(lambda: own_fleet.runs("at_gate") == 2)

    assert sent.get(timeout=LIMIT) == "a"


def test_200_soft_limits_at_random_moments_leave_nothing(own_fleet: Workers) -> None:
    own_fleet.stay_unmeasured()
    own_fleet.start(4)
    children = own_fleet.children()

    # Two keys for four processes: two wait for the lock while two work under it.
    sent = [
        tasks.endless.apply_async((str(number % 2),), soft_time_limit=random.uniform(0.005, 0.05))
        for number in range(200)
    ]
    for one in sent:
        with pytest.raises(SoftTimeLimitExceeded):
            one.get(timeout=LIMIT)

    wait_for(lambda: own_fleet.store.rows() == 0)
    assert own_fleet.children() == children
    with own_fleet.closed_gate():  # each child still works, with a session of its own
        healthy = [tasks.at_gate.delay(str(number)) for number in range(4)]
        wait_for(lambda: own_fleet.runs("at_gate") == 4)
        assert own_fleet.store.sessions() == own_fleet.store.rows() == 4
    assert [one.get(timeout=LIMIT) for one in healthy] == ["0", "1", "2", "3"]


def cut_session(fleet: Workers) -> None:
    """End the session of the one lock that is held, as a server or a network would."""
    ended = fleet.count(
        "SELECT count(pg_terminate_backend(l.pid, 5000)) FROM pg_locks l JOIN pg_database d ON l.database = d.oid"
        " WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"
    )
    assert ended == 1


def test_a_lost_lock_is_seen_by_the_body_and_is_no_success(fleet: Workers) -> None:
    with fleet.closed_gate():
        sent = tasks.tells_whether_it_is_lost.delay("a")
        wait_for(lambda: fleet.runs("at_gate") == 1)
        cut_session(fleet)

    with pytest.raises(LockLost, match="'gate:a' was lost while it was held"):
        sent.get(timeout=LIMIT)
    assert sent.state == "FAILURE"
    assert fleet.keys(tasks.tells_whether_it_is_lost.name) == ["False, True"]
    assert tasks.at_gate.delay("a").get(timeout=LIMIT) == "a"


def test_a_lost_lock_is_logged_where_the_settings_say_so(own_fleet: Workers) -> None:
    own_fleet.environment["ON_LOST"] = "log"
    own_fleet.start(1)
    with own_fleet.closed_gate():
        sent = tasks.tells_whether_it_is_lost.delay("a")
        wait_for(lambda: own_fleet.runs("at_gate") == 1)
        cut_session(own_fleet)

    assert sent.get(timeout=LIMIT) is True
    assert sent.state == "SUCCESS"
    assert "lock 'gate:a' was lost while it was held" in own_fleet.logs()
