"""The judge of `make chaos` finds what is wrong, and a seed means one and the same faults."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.chaos.faults import WEIGHTS, picked, plan
from benchmarks.chaos.judge import Fault, Run, judge, read_runs

FIRST = Run(job=1, key="a", token=1, by="celery", pid=11, begin=10.0, end=11.0)
SECOND = Run(job=2, key="a", token=2, by="dramatiq", pid=12, begin=11.0, end=12.0)
ELSEWHERE = Run(job=3, key="b", token=3, by="celery", pid=13, begin=10.5, end=11.5)

#: A cut of everything in the middle of the first run.
CUT = Fault("cut the network", 10.5, 10.5, cuts=(), sessions=1)

#: The first run was told of it; its job was done by another run, later.
TOLD = replace(FIRST, lost=10.55)
AGAIN = replace(FIRST, token=9, begin=20.0, end=21.0)


def wrong(*runs: Run, faults: tuple[Fault, ...] = ()) -> list[str]:
    """Give what the judge finds wrong with `runs`, whose jobs are all there are."""
    return judge(list(runs), list(faults), {run.job for run in runs}).wrong


def test_runs_one_after_the_other_are_right() -> None:
    assert wrong(FIRST, SECOND, ELSEWHERE) == []


def test_runs_of_a_key_that_overlap_are_wrong() -> None:
    assert wrong(FIRST, replace(SECOND, begin=10.9)) == ["a: jobs 1 and 2 overlap, and 1 was told nothing"]


def test_who_got_the_lock_first_says_the_token() -> None:
    late = replace(SECOND, token=0, begin=10.5)

    assert wrong(FIRST, late) == ["a: jobs 2 and 1 overlap, and 2 was told nothing"]


def test_a_token_that_comes_twice_is_wrong() -> None:
    assert wrong(FIRST, replace(SECOND, token=1)) == ["a: jobs 1 and 2 have the same token, 1"]


def test_an_overlap_with_a_run_that_was_told_is_right() -> None:
    assert wrong(TOLD, replace(SECOND, begin=10.6), AGAIN, faults=(CUT,)) == []


def test_an_overlap_with_a_run_that_was_told_too_late_is_wrong() -> None:
    late = replace(FIRST, lost=12.0, end=12.5)

    assert wrong(late, replace(SECOND, begin=10.6), AGAIN, faults=(CUT,)) == ["job 1 was told of its loss after 1.5 s"]


def test_a_process_that_was_stopped_can_not_be_told() -> None:
    late = replace(FIRST, lost=12.0, end=12.5)
    stop = Fault("stop one", 10.4, 11.9, pids=(FIRST.pid,))

    assert wrong(late, replace(SECOND, begin=10.6), AGAIN, faults=(stop, CUT)) == []


def test_a_cut_that_nobody_was_told_of_is_wrong() -> None:
    assert wrong(FIRST, faults=(CUT,)) == ["job 1 was told nothing, though its session was cut"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("hold up the network", 10.5, 10.5),
        replace(CUT, cuts=("b",)),
        replace(CUT, at=9.0, until=9.1),
        replace(CUT, at=10.6, until=10.6),
    ],
    ids=["cuts nothing", "of another key", "before it had its lock", "after it was told"],
)
def test_a_loss_without_a_cut_is_wrong(fault: Fault) -> None:
    assert wrong(TOLD, AGAIN, faults=(fault,)) == ["job 1 was told of a loss without a cut"]


def test_a_run_that_was_killed_before_it_could_be_told_is_right() -> None:
    dead = replace(FIRST, end=10.7, killed=True)

    assert wrong(dead, replace(SECOND, begin=10.6), AGAIN, faults=(CUT,)) == []


def test_a_run_that_was_killed_without_a_cut_holds_its_lock_until_then() -> None:
    dead = replace(FIRST, end=10.7, killed=True)

    assert wrong(dead, replace(SECOND, begin=10.6), AGAIN) == ["a: jobs 1 and 2 overlap, and 1 was told nothing"]


def test_a_job_that_no_run_completed_is_wrong() -> None:
    assert wrong(TOLD, faults=(CUT,)) == ["job 1 was never completed"]


def test_a_run_without_an_end_is_wrong() -> None:
    assert wrong(replace(FIRST, end=None)) == ["job 1 neither ended nor died", "job 1 was never completed"]


def test_a_run_ends_with_its_process(tmp_path: Path) -> None:
    log = tmp_path / "runs"
    begin = {"fact": "begin", "run": "x", "at": 10.0, "pid": 11, "job": 1, "key": "a", "token": 1, "by": "celery"}
    log.write_text(json.dumps(begin) + "\n")

    (run,) = read_runs(log, [Fault("kill one", 10.4, 10.4, pids=(11,))])

    assert (run.end, run.killed, run.completed) == (10.4, True, False)


def test_a_process_dies_once(tmp_path: Path) -> None:
    """Whose parent is slow to bury it is there to be killed again; and its number may have been another's before."""
    log = tmp_path / "runs"
    log.write_text(
        json.dumps(
            {"fact": "begin", "run": "r", "at": 10.0, "job": 1, "key": "a", "token": 1, "by": "celery", "pid": 11}
        )
        + "\n"
    )
    kills = [Fault("kill one", at, at, pids=(11,)) for at in (9.0, 10.4, 13.8)]

    (run,) = read_runs(log, kills)

    assert run.end == 10.4

    (run,) = read_runs(log, [Fault("kill a worker", 9.9, 10.1, pids=(10, 11))])  # it began while others were killed

    assert run.end == 10.1


def test_a_seed_means_the_same_faults_whoever_is_there() -> None:
    one, two, other = (list(islice(plan(seed), 200)) for seed in (1, 1, 2))

    assert one == two != other
    assert {step.verb for step in one} == set(WEIGHTS)
    assert all(picked(range(count), step.where) < count for step in one for count in (1, 2, 7))
