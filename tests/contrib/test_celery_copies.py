"""Two messages of one task: redelivered, sent again, or an own retry that overtakes its predecessor."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from celery import chain
from celery.result import AsyncResult

from concurrency_safe.contrib.celery import requeue
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer
from tests.contrib import celery_tasks as tasks
from tests.contrib.conftest import Workers
from tests.integration.conftest import wait_for

#: Seconds that a result may take.
LIMIT = 60

#: What marks the message of a task that met itself at work.
COPY = {requeue.DUPLICATES: 1}

#: Ends the sessions that hold a lock in this database (others are another lane's), and counts them.
CUT_HOLDERS = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database d ON database = d.oid "
    "WHERE locktype = 'advisory' AND granted AND datname = current_database()"
)

pytestmark = pytest.mark.timeout(180)


def ends(fleet: Workers, task_id: str) -> None:
    """Wait until a copy of the task has ended because the task itself has run."""
    wait_for(lambda: f"[{task_id}] has run already; this copy of it ends" in fleet.logs(), 30)


@pytest.mark.parametrize("task", [tasks.skipping, tasks.raising, tasks.calling, tasks.limited, tasks.patient])
def test_a_copy_of_a_task_that_has_run_ends_also_when_another_holds_the_key(task: Any, fleet: Workers) -> None:
    sent = task.delay("a")
    assert sent.get(timeout=LIMIT) == "a"

    fleet.rival.hold("one:a")
    task.apply_async(
        ("a",), task_id=sent.id, headers=COPY, link=tasks.failed.si("went on"), link_error=tasks.failed.si("failed")
    )
    ends(fleet, sent.id)

    assert sent.get(timeout=LIMIT) == "a"
    assert fleet.runs("failed") == 0


def test_a_copy_that_waits_for_the_lock_waits_for_the_state_too(fleet: Workers) -> None:
    """Celery stores the state after the lock's release, and the copy has the lock at once then."""
    with fleet.closed_gate():
        sent = tasks.at_gate_unhurried.delay("a")
        wait_for(lambda: fleet.runs("at_gate") == 1)
        tasks.at_gate_unhurried.apply_async(("a",), task_id=sent.id, headers=COPY)
        wait_for(lambda: fleet.store.waiting() == 1)
    ends(fleet, sent.id)

    assert sent.get(timeout=LIMIT) == "a"
    assert fleet.runs("at_gate") == 1


def test_a_copy_whose_lock_is_lost_while_it_waits_for_the_state_does_not_run_then(fleet: Workers) -> None:
    sent = tasks.patient.apply_async(("a",), headers=COPY)
    wait_for(lambda: fleet.store.connection.execute(CUT_HOLDERS).fetchone() == (1,))

    assert sent.get(timeout=LIMIT) == "a"
    assert f"[{sent.id}]: its lock was lost before its body began" in fleet.logs()


def test_a_task_that_has_failed_is_not_run_again_by_its_copy(fleet: Workers) -> None:
    errback = tasks.failed.si("failed")
    sent = tasks.retries_never.apply_async(("a",), link_error=errback)
    with pytest.raises(ValueError, match="body"):
        sent.get(timeout=LIMIT)
    wait_for(lambda: fleet.runs("failed") == 1)

    tasks.retries_never.apply_async(("a",), task_id=sent.id, headers=COPY, link_error=errback)
    ends(fleet, sent.id)

    assert fleet.runs("failed") == fleet.runs(tasks.retries_never.name) == 1


def test_where_a_failed_message_goes_back_to_the_broker_it_runs_again(fleet: Workers) -> None:
    sent = tasks.fails_and_is_requeued.delay("a")
    with pytest.raises(ValueError, match="body"):
        sent.get(timeout=LIMIT)

    tasks.fails_and_is_requeued.apply_async(("a",), task_id=sent.id, headers=COPY)
    wait_for(lambda: fleet.runs(tasks.fails_and_is_requeued.name) == 2)


def test_without_a_result_backend_a_copy_runs(own_fleet: Workers) -> None:
    """Whether the task has run can't be known, and work that is done twice is better than work that is lost."""
    own_fleet.environment["TESTS_RESULT_URL"] = "disabled://"
    own_fleet.start(1)
    tasks.acked_late.apply_async(("a", 1), headers=COPY)

    wait_for(lambda: own_fleet.runs(tasks.acked_late.name) == 1, 30)


def test_a_copy_waits_for_a_result_backend_that_is_away(own_fleet: Workers) -> None:
    own_fleet.environment["TESTS_RESULT_URL"] = "redis://127.0.0.1:1/0"
    own_fleet.start(1)
    tasks.acked_late.apply_async(("a", 1), headers=COPY)

    wait_for(lambda: own_fleet.logs().count("whether it has run already can't be read now") >= 2, 60)
    assert own_fleet.runs(tasks.acked_late.name) == 0


def test_whom_nobody_can_name_may_be_the_task_itself(own_fleet: Workers) -> None:
    """An own retry is not skipped when its predecessor lets go between the conflict and the question who it was.

    Here a prepared transaction holds the key, whose process can't be named.
    """
    with PostgresServer({"max_prepared_transactions": "1"}) as lock_store:
        own_fleet.environment["CONCURRENCY_SAFE_DSN"] = lock_store.dsn
        own_fleet.start(1)
        with psycopg.connect(lock_store.dsn, autocommit=True) as holder:
            number = lock_key("one:a").number
            holder.execute(f"BEGIN; SELECT pg_advisory_xact_lock({number}); PREPARE TRANSACTION 'nobody'")
            sent = [tasks.skipping.delay("a"), tasks.raising.delay("a")]
            for one in sent:
                wait_for(lambda one=one: f"[{one.id}] ignored" in own_fleet.logs(), 30)  # type: ignore[misc]  # a default binds the loop variable
            holder.execute("COMMIT PREPARED 'nobody'")
        assert [one.get(timeout=LIMIT) for one in sent] == ["a", "a"]
        assert own_fleet.end() == [0]


def test_a_message_that_waited_in_a_worker_while_its_copy_ran_is_not_run(own_fleet: Workers) -> None:
    own_fleet.environment["VISIBILITY_TIMEOUT"] = "2"
    own_fleet.start(1, "--prefetch-multiplier", "4")
    with own_fleet.closed_gate():
        tasks.at_gate.apply_async(("a",), expires=1)  # so that its own copy is none of the others' business
        wait_for(lambda: own_fleet.runs("at_gate") == 1)
        sent = chain(tasks.acked_late.s("b", 1), tasks.failed.s()).apply_async()
        assert isinstance(sent.parent, AsyncResult)
        first = sent.parent.id
        wait_for(lambda: f"[{first}] received" in own_fleet.logs())
        own_fleet.start(1)
        sent.get(timeout=LIMIT)
    ends(own_fleet, first)

    assert own_fleet.runs(tasks.acked_late.name) == own_fleet.runs("failed") == 1


def test_a_message_goes_back_to_the_queue_in_the_encoding_in_which_it_came(fleet: Workers) -> None:
    fleet.rival.hold("one:a")
    sent = tasks.counts.apply_async(("a", frozenset([1, 2])), serializer="pickle")
    wait_for(lambda: f"[{sent.id}] retry: Retry in" in fleet.logs())
    fleet.rival.let_go()

    assert sent.get(timeout=LIMIT) == 2


@pytest.mark.parametrize("task", [tasks.counts, tasks.counts_early])
def test_a_message_that_can_not_be_sent_again_has_failed(task: Any, fleet: Workers) -> None:
    """The receiver's words for an encoding are not always a sender's: here, one that only decodes."""
    fleet.rival.hold("one:a")
    sent = task.apply_async(("a", [1]), serializer="read-only")
    with pytest.raises(Exception, match="this encoding is read only"):
        sent.get(timeout=LIMIT)


def test_a_skip_is_an_event(fleet: Workers) -> None:
    """Also where nobody told the worker to send events: its pool's processes don't know."""
    fleet.rival.hold("one:a")
    sent: list[AsyncResult[str]] = []
    seen: list[dict[str, Any]] = []

    class Receiver(tasks.app.events.Receiver):  # type: ignore[name-defined,misc]  # made by the app
        def on_consume_ready(self, *_: object, **__: object) -> None:
            sent.append(tasks.skipping.delay("a"))

        def see(self, event: dict[str, Any]) -> None:
            seen.append(event)
            self.should_stop = True

    with tasks.app.connection_for_read(fleet.broker) as connection:
        receiver = Receiver(connection)
        receiver.handlers = {"task-skipped": receiver.see}
        receiver.capture(limit=None, timeout=30, wakeup=False)

    assert [(event["uuid"], event["lock_key"]) for event in seen] == [(sent[0].id, "one:a")]
