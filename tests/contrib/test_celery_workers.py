"""Guarded tasks on real workers: exclusion, policies, ways out, deaths.

The interval log in the database is the judge.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TimeLimitExceeded
from celery.result import AsyncResult

from concurrency_safe import LockAcquireTimeout, LockLost, LockUnavailable
from concurrency_safe.testing import PostgresServer
from tests.contrib import celery_tasks as tasks
from tests.contrib.conftest import Workers
from tests.integration.conftest import wait_for

#: Seconds that a result may take; nothing may hang.
LIMIT = 30

KEYS = 5
TASKS = 200

#: Tasks that are under way when the lock store stops, and for how long it is away.
LOAD = 40
OUTAGE = dt.timedelta(seconds=2)

pytestmark = pytest.mark.timeout(180)


def test_200_tasks_on_5_keys_never_overlap(fleet: Workers) -> None:
    retries, tracebacks = fleet.logs().count("Retry in"), fleet.logs().count("Traceback")

    sent = [tasks.guarded.delay(str(number % KEYS)) for number in range(TASKS)]
    results = [one.get(timeout=150) for one in sent]

    assert results == [str(number % KEYS) for number in range(TASKS)]
    assert fleet.runs("guarded") == TASKS
    assert fleet.overlaps("guarded", same_key=True) == 0
    assert fleet.overlaps("guarded", same_key=False) > 0
    assert fleet.logs().count("Retry in") > retries  # conflicts there were
    assert fleet.logs().count("Traceback") == tracebacks  # and each was one line


def test_the_same_tasks_unguarded_do_overlap(fleet: Workers) -> None:
    group(tasks.unguarded.s(str(number % KEYS)) for number in range(TASKS)).apply_async().get(timeout=LIMIT)

    assert fleet.runs("unguarded") == TASKS
    assert fleet.overlaps("unguarded", same_key=True) > 0


def test_retry_waits_for_the_holder_and_gives_the_result(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = tasks.patient.delay("a")
    wait_for(lambda: sent.state == "RETRY")
    fleet.rival.let_go()

    assert sent.get(timeout=LIMIT) == "a"


def test_a_spent_retry_fails_with_the_conflict(fleet: Workers) -> None:
    fleet.rival.hold("one:a")

    with pytest.raises(LockAcquireTimeout, match=r"'one:a' is held by") as caught:
        tasks.limited.delay("a").get(timeout=LIMIT)
    assert caught.value.key == "one:a"
    assert str(fleet.rival.pid) in (caught.value.holder or "")


def test_skip_succeeds_with_its_result_and_says_so(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = tasks.skipping.delay("a")

    assert sent.get(timeout=LIMIT) == "skipped"
    assert sent.state == "SUCCESS"
    assert f"[{sent.id}] was skipped" in fleet.logs()
    assert tasks.skipping.delay("b").get(timeout=LIMIT) == "b"


def test_raise_fails_at_once_and_is_no_failure_of_the_body(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = tasks.raising.delay("a")

    with pytest.raises(LockAcquireTimeout):
        sent.get(timeout=LIMIT)
    assert sent.state == "FAILURE"
    assert f"raising[{sent.id}] retry" not in fleet.logs()


def test_a_callable_gives_the_result(fleet: Workers) -> None:
    fleet.rival.hold("one:a")

    assert tasks.calling.delay("a").get(timeout=LIMIT) == "a is busy"


def test_a_callable_key_and_a_policy_that_sees_the_conflict(fleet: Workers) -> None:
    assert tasks.by_function.delay("a").get(timeout=LIMIT) == "a"
    fleet.rival.hold(("one", "b"))

    assert tasks.by_function.delay("b").get(timeout=LIMIT) == "b: 0.05"


def test_the_default_key_is_the_name_and_all_arguments_however_they_are_given(fleet: Workers) -> None:
    sent = [
        tasks.by_all_arguments.delay("a"),
        tasks.by_all_arguments.delay(key="a", times=1),
        tasks.by_all_arguments.s(1).apply_async(("a",)),
    ]
    keys = {tuple(one.get(timeout=LIMIT)) for one in sent}

    assert keys == {('tests.contrib.celery_tasks.by_all_arguments{"key":"a","times":1}',)}


def test_a_class_is_guarded_as_well(fleet: Workers) -> None:
    by_class = tasks.app.tasks["by_class"]
    assert by_class.delay("a").get(timeout=LIMIT) == "a"
    fleet.rival.hold("one:a")

    with pytest.raises(LockAcquireTimeout):
        by_class.delay("a").get(timeout=LIMIT)


def test_a_task_enters_its_own_lock_again(fleet: Workers) -> None:
    assert tasks.nests.delay("a", 2).get(timeout=LIMIT) == "a"


def conflicts(fleet: Workers, sent: list[AsyncResult[Any]]) -> set[str]:
    """Give those of the tasks that have met a conflict."""
    return {one.id for one in sent if f"[{one.id}] retry: Retry in" in fleet.logs()}


def test_slots_let_so_many_run_at_once(fleet: Workers) -> None:
    with fleet.closed_gate():
        sent = [tasks.two_at_gate.delay("a") for _ in range(4)]
        wait_for(lambda: len(conflicts(fleet, sent)) >= 2 and fleet.runs("at_gate") >= 2)
        assert fleet.runs("at_gate") == 2

    assert [one.get(timeout=LIMIT) for one in sent] == ["a"] * 4


def test_two_messages_of_one_task_are_not_two_holders_of_a_slot(fleet: Workers) -> None:
    with fleet.closed_gate():
        sent = tasks.two_at_gate.delay("a")
        wait_for(lambda: fleet.runs("at_gate") == 1)
        tasks.two_at_gate.apply_async(("a",), task_id=sent.id)
        wait_for(lambda: f"[{sent.id}] ignored" in fleet.logs())

    assert sent.get(timeout=LIMIT) == "a"
    wait_for(lambda: f"[{sent.id}] has run already" in fleet.logs())
    assert fleet.runs("at_gate") == 1


def test_readers_share_and_a_writer_waits_for_them(fleet: Workers) -> None:
    with fleet.closed_gate():
        readers = [tasks.reads_at_gate.delay("a") for _ in range(3)]
        wait_for(lambda: fleet.runs("at_gate") == 3)
        writer = tasks.writes.delay("a")
        wait_for(lambda: conflicts(fleet, [writer]))
        assert fleet.runs("writes") == 0

    assert [one.get(timeout=LIMIT) for one in [*readers, writer]] == ["a"] * 4


@pytest.mark.parametrize("task", ["patient", "skipping"])
def test_canvases_go_on(task: str, fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    busy = getattr(tasks, task)
    chained = chain(busy.s("a"), tasks.total.s()).apply_async()
    grouped: Any = group(busy.s("a"), busy.s("b")).apply_async()
    header = chord([busy.s("a"), busy.s("c")], tasks.total.s()).apply_async()
    if task == "patient":
        wait_for(lambda: grouped.results[0].state == "RETRY")
        fleet.rival.let_go()
    expected = "a" if task == "patient" else "skipped"

    assert chained.get(timeout=LIMIT) == expected
    assert grouped.get(timeout=LIMIT) == [expected, "b"]
    assert header.get(timeout=LIMIT) == [expected, "c"]


def test_raise_in_a_chord_fails_the_chord(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = chord([tasks.raising.s("a"), tasks.raising.s("b")], tasks.total.s()).apply_async()

    # Not by get(): it takes a TimeoutError of a parent, which a conflict is, for its own.
    wait_for(lambda: sent.state == "FAILURE")
    assert isinstance(sent.result, ChordError)
    assert "LockAcquireTimeout" in str(sent.result)


def test_a_tasks_own_retry_is_never_skipped(fleet: Workers) -> None:
    assert tasks.retries_itself.delay("a").get(timeout=LIMIT) == "done"


def test_conflicts_spend_none_of_the_tasks_own_retries(fleet: Workers) -> None:
    fleet.rival.hold("own:a")
    sent = tasks.fails_twice.delay("a")
    wait_for(lambda: fleet.logs().count(f"fails_twice[{sent.id}] retry") >= 5)
    fleet.rival.let_go()

    assert sent.get(timeout=LIMIT) == 2


def test_20_conflicts_leave_a_tasks_own_retries_and_callbacks_alone(fleet: Workers) -> None:
    retrying = (tasks.retries_by_hand, tasks.retries_by_option, tasks.retries_never)
    for task in retrying:
        fleet.rival.hold(f"own:{task.__name__}")
    sent = [task.apply_async((task.__name__,), link_error=tasks.failed.s()) for task in retrying]
    for one in sent:
        wait_for(lambda one=one: fleet.logs().count(f"{one.id}] retry: Retry in") >= 20)  # type: ignore[misc]  # a default binds the loop variable
    fleet.rival.let_go()

    for one in sent:
        with pytest.raises(ValueError, match="body"):
            one.get(timeout=LIMIT)
    for task, attempts in zip(retrying, (["0", "1", "2"], ["0", "1", "2"], ["0"]), strict=True):
        assert fleet.keys(task.name) == attempts
    wait_for(lambda: sorted(fleet.keys("failed")) == sorted(one.id for one in sent))  # link_error, once each


def test_a_spent_wait_fails_with_the_conflict_and_calls_link_error_once(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = tasks.waits_half_a_second.apply_async(("a",), link_error=tasks.failed.s())

    with pytest.raises(LockAcquireTimeout, match="'one:a' is held by"):
        sent.get(timeout=LIMIT)
    assert sent.state == "FAILURE"
    wait_for(lambda: fleet.keys("failed") == [sent.id])
    fleet.rival.let_go()
    assert tasks.waits_half_a_second.delay("a").get(timeout=LIMIT) == "a"
    assert fleet.keys("failed") == [sent.id]


@pytest.mark.parametrize("how", ["return", "raise", "Ignore", "Reject", "Retry", "SystemExit"])
def test_every_way_out_frees_the_lock(how: str, fleet: Workers) -> None:
    tasks.leaves.delay(how)

    wait_for(lambda: fleet.count("SELECT count(*) FROM intervals WHERE key = %s", how) > 0)
    wait_for(lambda: fleet.store.rows() == 0 and fleet.rival.is_free(f"out:{how}"), 5.0)


def test_a_soft_limit_ends_a_wait_and_leaves_nothing(fleet: Workers) -> None:
    fleet.rival.hold("slow:a")
    sent: AsyncResult[str] = tasks.waits.delay("a")
    wait_for(lambda: fleet.store.waiting() == 1)

    with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
        sent.get(timeout=LIMIT)
    wait_for(lambda: fleet.store.waiting() == 0 and fleet.store.rows() == 1, 1.0)  # the rival's is left
    assert tasks.patient.delay("b").get(timeout=LIMIT) == "b"


def test_a_soft_limit_in_the_body_frees_the_lock(fleet: Workers) -> None:
    sent = tasks.sleeps.apply_async(("a", 20), soft_time_limit=1)
    with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
        sent.get(timeout=LIMIT)

    wait_for(lambda: fleet.rival.is_free("slow:a"), 1.0)


def test_a_hard_limit_frees_the_lock(fleet: Workers) -> None:
    sent = tasks.sleeps.apply_async(("a", 20), time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=LIMIT)

    wait_for(lambda: fleet.rival.is_free("slow:a"), 1.0)


def test_a_killed_process_frees_the_lock_and_the_task_completes_once(fleet: Workers) -> None:
    sent = tasks.sleeps.delay("a", 2)
    wait_for(lambda: fleet.runs("sleeps") == 1)
    assert not fleet.rival.try_hold("slow:a")

    pid = fleet.count("SELECT key FROM intervals")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: fleet.rival.is_free("slow:a"), 1.0)

    assert sent.get(timeout=LIMIT) == "a"
    assert fleet.runs("sleeps") == 2


def test_the_holder_of_a_lock_can_be_named(fleet: Workers) -> None:
    with fleet.closed_gate():
        first = tasks.at_gate.delay("a")
        wait_for(lambda: fleet.runs("at_gate") == 1)
        # A process that an earlier test killed is missed after up to 5 s only; its task waits for so long.
        second = tasks.at_gate.delay("a")
        wait_for(lambda: second.state == "RETRY")

    assert f"running '{first.id}'" in fleet.logs()
    assert first.get(timeout=LIMIT) == "a"
    assert second.get(timeout=LIMIT) == "a"


def test_a_store_that_stops_under_load_lets_no_body_run_and_loses_no_task(own_fleet: Workers) -> None:
    """The bodies write to another server, so that nothing but the guard keeps them from running."""
    fleet = own_fleet
    with PostgresServer() as lock_store:
        fleet.environment["CONCURRENCY_SAFE_DSN"] = lock_store.dsn
        fleet.start(4)
        sent = {number: tasks.acked_late.delay(str(number % 3), number) for number in range(LOAD)}
        wait_for(lambda: fleet.runs(tasks.acked_late.name) >= LOAD // 10)

        lock_store.kill()
        stopped = fleet.now()
        failing = tasks.raising.delay("a")
        with pytest.raises(LockUnavailable):
            failing.get(timeout=LIMIT)
        wait_for(lambda: fleet.now() - stopped >= OUTAGE, 60)
        assert fleet.logs().count("the lock store can't be reached") >= LOAD
        started = fleet.now()
        lock_store.start()

        results = [(number, one.get(timeout=60, propagate=False)) for number, one in sent.items()]
    lost = [result for _, result in results if isinstance(result, LockLost)]
    assert len(lost) <= 4  # at work when the store stopped, one a child
    assert all(result == number for number, result in results if not isinstance(result, LockLost))
    assert LOAD - len(lost) <= fleet.runs(tasks.acked_late.name) <= LOAD
    assert fleet.overlaps(tasks.acked_late.name, same_key=True) == 0
    begun = "SELECT count(*) FROM intervals WHERE started > %s AND started < %s"
    # One that was granted its lock just before may begin just after; it is told of the loss.
    assert fleet.count(begun, stopped, started) <= len(lost)
    assert fleet.count(begun, stopped + dt.timedelta(seconds=0.5), started) == 0


def test_a_message_delivered_twice_runs_once(worker_database: str, tmp_path: Path) -> None:
    """Redis gives an unacknowledged message to the next worker after its visibility timeout, also while it runs."""
    fleet = Workers(worker_database, tmp_path)
    fleet.environment["VISIBILITY_TIMEOUT"] = "2"
    fleet.clear()
    try:
        fleet.start(2)
        fleet.start(2)
        results = {
            name: chain(getattr(tasks, name).s("a", 7), tasks.total.s()).apply_async()
            for name in ("sleeps", "sleeps_or_skips", "sleeps_or_raises")
        }
        for name, result in results.items():
            assert result.get(timeout=60) == "a"
            assert isinstance(result.parent, AsyncResult)
            task = f"{name}[{result.parent.id}]"
            assert f"{task} ignored" in fleet.logs()  # the copy met the task at work
            ended = f"{task} has run already; this copy of it ends"
            wait_for(lambda ended=ended: ended in fleet.logs(), 30)  # type: ignore[misc]  # a default binds the loop variable
        assert fleet.runs("sleeps") == len(results)
    finally:
        fleet.stop()
