"""Guarded actors on real workers: exclusion, policies, canvases. The interval log in the database is the judge."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq.results import ResultFailure

from tests.contrib import dramatiq_actors as actors
from tests.contrib.dramatiq_fleet import (
    LIMIT,
    Workers,
    a_group,
    a_pipeline,
    any_crew,
    crew,
    rabbitmq_workers,
    redis_workers,
)
from tests.integration.conftest import wait_for

__all__ = ["any_crew", "crew", "rabbitmq_workers", "redis_workers"]  # fixtures, for this file

pytestmark = pytest.mark.timeout(180)

#: Messages with one key.
MESSAGES = 60


def conflicts(crew: Workers, actor: str) -> int:
    return crew.logs().count(f"of actor {actor} goes back to the queue")


def test_messages_with_one_key_run_one_at_a_time_and_each_once(any_crew: Workers) -> None:
    crew = any_crew
    dead = crew.dead()
    kinds = (actors.guarded, actors.aguarded, actors.by_class)

    sent = [(number, crew.send(kind, "one", number)) for number in range(MESSAGES // 3) for kind in kinds]
    sent += [(number, crew.send(kind, "other", number)) for number in range(MESSAGES // 6) for kind in kinds]
    control = [crew.send(actors.unguarded, "one") for _ in range(MESSAGES // 4)]

    for number, one in sent:
        assert crew.result(one) == number
    assert [crew.result(one) for one in control] == ["one"] * (MESSAGES // 4)
    assert crew.runs("job") == MESSAGES + MESSAGES // 2
    assert crew.overlaps("job", same_key=True) == 0
    assert crew.overlaps("job", same_key=False) > 0
    assert crew.overlaps("unguarded", same_key=True) > 0
    assert all(conflicts(crew, kind.actor_name) > 0 for kind in kinds)
    assert crew.dead() == dead
    assert crew.runs("failed") == 0
    wait_for(lambda: crew.queued() == 0)


def test_a_conflict_is_a_line_at_info(crew: Workers) -> None:
    crew.rival.hold("one:quiet")
    sent = crew.send(actors.patient, "quiet")
    wait_for(lambda: f"[INFO] message {sent.message_id} of actor patient goes back" in crew.logs())
    crew.rival.let_go()

    assert crew.result(sent) == "quiet"
    lines = [line for line in crew.logs().splitlines() if "quiet" in line or sent.message_id in line]
    assert not [line for line in lines if "[INFO]" not in line]


def test_retry_leaves_results_and_callbacks_to_the_run(crew: Workers) -> None:
    crew.rival.hold("one:a")
    sent = crew.send(actors.patient, "a")
    wait_for(lambda: crew.logs().count(f"message {sent.message_id} of actor patient goes back") >= 3)
    with pytest.raises(dramatiq.results.ResultMissing):
        sent.get_result(backend=actors.RESULTS)
    assert crew.runs("failed") + crew.runs("succeeded") == 0
    crew.rival.let_go()

    assert crew.result(sent) == "a"
    wait_for(lambda: crew.keys("succeeded") == [f"{sent.message_id} a"])
    assert crew.runs("failed") == 0


def test_a_spent_retry_is_a_dead_letter_with_its_reason(any_crew: Workers) -> None:
    crew = any_crew
    dead = crew.dead()
    crew.rival.hold("one:a")
    sent = crew.send(actors.limited, "a")

    with pytest.raises(ResultFailure, match=r"'one:a' is held by .*budget of on_conflict is spent \(2 tries") as caught:
        crew.result(sent)
    assert caught.value.orig_exc_type == "ConflictBudgetSpent"
    wait_for(lambda: crew.dead() == dead + 1 and crew.queued() == 0)
    wait_for(lambda: crew.runs("failed") == crew.runs("exhausted") == 1)
    assert crew.keys("failed")[0].startswith(f"{sent.message_id} ConflictBudgetSpent: lock 'one:a' is held by")
    assert conflicts(crew, "limited") >= 2


def test_skip_ends_with_its_result_and_says_so(any_crew: Workers) -> None:
    crew = any_crew
    crew.rival.hold("one:a")
    sent = crew.send(actors.skipping, "a")

    assert crew.result(sent) == "skipped"
    assert crew.result(crew.send(actors.skipping, "b")) == "b"
    assert f"message {sent.message_id} of actor skipping was skipped: lock 'one:a' is held by" in crew.logs()
    assert crew.keys("skipping") == ["b"]
    wait_for(lambda: crew.queued() == 0)


def test_raise_fails_as_the_actor_would(crew: Workers) -> None:
    dead = crew.dead()
    crew.rival.hold("one:a")
    sent = crew.send(actors.raising, "a")

    with pytest.raises(ResultFailure, match="'one:a' is held by"):
        crew.result(sent)
    wait_for(lambda: crew.dead() == dead + 1)
    wait_for(lambda: crew.runs("failed") == 2)  # once for each attempt, as Dramatiq does
    assert crew.runs("raising") == 0


def test_raise_runs_when_an_own_retry_finds_the_lock_free(crew: Workers) -> None:
    crew.rival.hold("one:a")
    sent = crew.send(actors.raising, "a", max_retries=100)
    wait_for(lambda: crew.runs("failed") == 1)
    crew.rival.let_go()

    assert crew.result(sent) == "a"


def test_a_callable_gives_the_result(crew: Workers) -> None:
    crew.rival.hold("one:a")

    assert crew.result(crew.send(actors.calling, "a")) == "a is busy"


def test_a_callable_key_and_a_policy_that_sees_the_conflict(crew: Workers) -> None:
    assert crew.result(crew.send(actors.by_function, "a")) == "a"
    crew.rival.hold(("one", "b"))

    assert crew.result(crew.send(actors.by_function, "b")) == "b: 0.05"


def test_all_arguments_make_one_key_however_they_are_given(crew: Workers) -> None:
    sent = [
        crew.send(actors.by_all_arguments, "a"),
        crew.send(actors.by_all_arguments, "a", 1),
        crew.send(actors.by_all_arguments, kwargs={"key": "a", "times": 1}),
    ]
    assert {crew.result(one) for one in sent} == {'by_all_arguments{"key":"a","times":1}'}


def test_an_actor_enters_its_own_lock_again(crew: Workers) -> None:
    assert crew.result(crew.send(actors.nests, "a", 2)) == "a"


def test_conflicts_spend_none_of_the_actors_own_retries(crew: Workers) -> None:
    crew.rival.hold("own:a")
    sent = crew.send(actors.fails_twice, "a")
    wait_for(lambda: conflicts(crew, "fails_twice") >= 5)
    crew.rival.let_go()

    assert crew.result(sent) == "3 runs"


def test_options_of_a_message_go_before_those_of_the_actor(crew: Workers) -> None:
    crew.rival.hold("one:a")

    assert crew.result(crew.send(actors.skipping, "a", lock_key="two:{key}")) == "a"
    assert crew.result(crew.send(actors.patient, "a", on_conflict="skip")) is None
    with pytest.raises(ResultFailure, match="names 'kee'"):
        crew.result(crew.send(actors.patient, "a", lock_key="two:{kee}"))


@pytest.mark.parametrize("name", ["patient", "skipping"])
def test_groups_and_pipelines_go_on(name: str, any_crew: Workers) -> None:
    crew = any_crew
    actor = getattr(actors, name)
    crew.rival.hold("one:a")
    piped = a_pipeline([crew.message(actor, "a"), crew.message(actors.total)], broker=crew.broker)
    grouped = a_group([crew.message(actor, "a"), crew.message(actor, "b")], broker=crew.broker)
    grouped.add_completion_callback(crew.message(actors.group_done, name))
    piped.run()
    grouped.run()
    if name == "patient":
        wait_for(lambda: conflicts(crew, name) >= 2)
        crew.rival.let_go()
    expected = "a" if name == "patient" else "skipped"

    assert piped.get_result(block=True, timeout=LIMIT) == [expected]
    assert list(grouped.get_results(block=True, timeout=LIMIT)) == [expected, "b"]
    wait_for(lambda: crew.keys("group_done") == [name])


def test_a_pipeline_of_steps_with_one_key_completes(crew: Workers) -> None:
    steps = [crew.message(actors.guarded, "one", 1), crew.message(actors.guarded, "one", 2, pipe_ignore=True)]
    both = [a_pipeline(steps, broker=crew.broker).run() for _ in range(2)]

    for piped in both:
        assert list(piped.get_results(block=True, timeout=LIMIT)) == [1, 2]


def test_a_key_error_never_runs_the_body(crew: Workers) -> None:
    dead = crew.dead()
    sent = crew.send(actors.misses, None)

    with pytest.raises(ResultFailure, match="KeyTemplateError"):
        crew.result(sent)
    wait_for(lambda: crew.dead() == dead + 1)
    assert crew.runs("misses") == 0


def test_an_async_actor_holds_its_lock_until_it_has_really_ended(crew: Workers) -> None:
    """A time limit cancels it, and it goes on for 2.5 s; Dramatiq waits for 1 s of these."""
    crew.send(actors.shields, "a", 2.5, time_limit=500)
    wait_for(lambda: crew.runs("shields cancelled") == 1)
    ticking = crew.send(actors.ticks, "b", 2.0)
    second = crew.send(actors.shields, "a", 0.05)

    assert crew.result(second) == "a"
    assert crew.runs("shields") == 2
    assert crew.overlaps("shields", same_key=True) == 0
    assert crew.result(ticking) < 0.2


@pytest.mark.parametrize("name", ["again", "again_in_a_slot", "again_shared"])
def test_an_async_actor_that_was_cancelled_and_its_next_attempt_never_overlap(name: str, crew: Workers) -> None:
    """Nor where the lock admits several; and a short time limit is not used up by looks for an earlier result."""
    sent = crew.send(getattr(actors, name), "a", 2.5)
    wait_for(lambda: crew.runs("again") >= 2, 30)
    wait_for(lambda: crew.queued() == 0, 30)

    assert crew.runs("again cancelled") >= 2
    assert crew.overlaps("again", same_key=True) == 0
    with pytest.raises(ResultFailure, match=r"TimeLimitExceeded|Timed out while waiting"):  # of each attempt
        crew.result(sent)


def test_async_actors_that_wait_for_a_lock_leave_the_loop_to_others(crew: Workers) -> None:
    crew.rival.hold("tick:a")
    waiting = [crew.send(actors.awaits, "a") for _ in range(3)]
    wait_for(lambda: crew.store.waiting() >= 1)
    ticking = [crew.send(actors.ticks, str(number), 1.0) for number in range(4)]

    assert max(crew.result(one) for one in ticking) < 0.2
    crew.rival.let_go()
    assert [crew.result(one) for one in waiting] == ["a"] * 3


def test_a_conflict_of_an_async_actor_is_decided_while_the_threads_of_the_loop_are_busy(crew: Workers) -> None:
    crew.rival.hold("one:a")
    crew.send(actors.fills_the_executor, 4)
    wait_for(lambda: crew.runs("fills_the_executor") == 1)
    # One of two processes has busy threads; both get some of these.
    sent = [crew.send(actors.skipping_async, "a") for _ in range(8)]

    assert [crew.result(one, 3000) for one in sent] == [None] * 8
