"""The judge: reads the log of the runs and the list of the faults, and knows nothing of locks.

In which order the runs of a key got the lock, their tokens say: a process may be stopped between the grant and the
first line of the body, and write that line long after its lock was lost and another run has begun.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

#: Seconds around a cut in which a run that begins or ends may or may not have been hit by it.
MARGIN = 0.1

#: Most seconds between the grant and the first line of the body, and between a cut and the moment in which the holder
#: is told, on a machine with far more processes than processors. While a process is stopped its time stands still.
GRANTED, TOLD = 0.5, 1.0


@dataclass
class Run:
    """One run of a body; `end` is the death of its process where it was killed, None where it goes on."""

    job: int
    key: str
    token: int
    by: str
    pid: int
    begin: float
    end: float | None = None
    lost: float | None = None
    killed: bool = False

    @property
    def completed(self) -> bool:
        """Whether it came to its end, and was not told that its lock was lost."""
        return self.end is not None and self.lost is None and not self.killed


@dataclass(frozen=True)
class Fault:
    """What was done to whom, and from when to when.

    `cuts` says whose sessions it ended (None: none; empty: all; else those of these keys), `sessions` how many.
    """

    name: str
    at: float
    until: float
    pids: tuple[int, ...] = ()
    cuts: tuple[str, ...] | None = None
    sessions: int = 0

    def is_aimed_at(self, run: Run) -> bool:
        """Say whether it ends the session of `run`, if that has one just then."""
        return self.cuts is not None and (not self.cuts or run.key in self.cuts)

    def hits(self, run: Run) -> bool:
        """Say whether the session of `run` was certainly ended by it, while the body ran."""
        ends_later = run.end is None or run.end > self.until + MARGIN
        return self.is_aimed_at(run) and run.begin < self.at - MARGIN and ends_later


class Witness:
    """What the faults explain: which cut a run has met, and how long it took to notice."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        """Take the faults, in their order."""
        faults = list(faults)
        self._cuts = [fault for fault in faults if fault.cuts is not None]
        self._stops: dict[int, list[Fault]] = defaultdict(list)
        for fault in faults:
            if fault.name.startswith("stop"):
                for pid in fault.pids:
                    self._stops[pid].append(fault)

    def awake(self, run: Run, since: float, until: float) -> float:
        """Give the seconds from `since` to `until` in which the process of `run` was not stopped."""
        stopped = sum(max(0.0, min(stop.until, until) - max(stop.at, since)) for stop in self._stops.get(run.pid, ()))
        return max(0.0, until - since - stopped)

    def lag(self, run: Run, noticed: float) -> float | None:
        """Give the seconds, awake, from the cut of the session of `run` to `noticed`; None: there was no cut.

        The first one that has certainly hit it, or else the last one that may have.
        """
        before = [cut for cut in self._cuts if cut.is_aimed_at(run) and cut.at < noticed]
        certain = [cut for cut in before if run.begin < cut.at - MARGIN]
        possible = [cut for cut in before if self.awake(run, cut.until, run.begin) < GRANTED]
        if not possible:
            return None
        cut = certain[0] if certain else possible[-1]
        return self.awake(run, cut.until, noticed)


def read_runs(log: Path, faults: list[Fault]) -> list[Run]:
    """Read the runs; a run of a process that was killed ends with it."""
    runs: dict[str, Run] = {}
    for line in log.read_text().splitlines():
        fact: dict[str, Any] = json.loads(line)
        name, run, at = fact["fact"], fact["run"], fact["at"]
        if name == "begin":
            runs[run] = Run(fact["job"], fact["key"], fact["token"], fact["by"], fact["pid"], at)
        elif name == "end":
            runs[run].end = at
        else:
            runs[run].lost = at
    kills = [fault for fault in faults if fault.name.startswith("kill")]
    for one in runs.values():
        if one.end is None:
            # The first one: a dead process is there, and may be killed again, until its parent asks for it.
            deaths = [kill for kill in kills if one.pid in kill.pids and kill.until >= one.begin]
            if deaths:
                first = deaths[0]
                one.end, one.killed = first.at if one.begin <= first.at else first.until, True
    return list(runs.values())


@dataclass
class Verdict:
    """What was found; each text of `wrong` is one violation."""

    figures: dict[str, int]
    wrong: list[str]


def judge(runs: list[Run], faults: list[Fault], jobs: set[int]) -> Verdict:
    """Judge: overlaps only after a loss that was told; losses told where sessions were cut; rising tokens; all done."""
    witness = Witness(faults)
    wrong, told_overlaps, early_deaths = _overlaps(runs, witness)
    hit = [run for run in runs if not run.killed and any(fault.hits(run) for fault in faults)]
    wrong += [f"job {run.job} was told nothing, though its session was cut" for run in hit if run.lost is None]
    lags = [(run.job, witness.lag(run, run.lost)) for run in runs if run.lost is not None]
    wrong += [f"job {job} was told of a loss without a cut" for job, lag in lags if lag is None]
    wrong += [f"job {job} was told of its loss after {lag:.1f} s" for job, lag in lags if lag and not _is_soon(lag)]
    wrong += [f"job {run.job} neither ended nor died" for run in runs if run.end is None]
    undone = jobs - {run.job for run in runs if run.completed}
    wrong += [f"job {job} was never completed" for job in sorted(undone)]
    figures = {
        "jobs": len(jobs),
        "runs": len(runs),
        "runs in Celery's workers": sum(run.by == "celery" for run in runs),
        "runs in Dramatiq's workers": sum(run.by == "dramatiq" for run in runs),
        "runs that were killed": sum(run.killed for run in runs),
        "runs whose session was certainly cut": len(hit),
        "runs that were told of a loss": len(lags),
        "longest time until it was told, in ms": round(max([lag or 0.0 for _, lag in lags], default=0.0) * 1000),
        "sessions that were cut": sum(fault.sessions for fault in faults),
        "overlaps with a run that was told": told_overlaps,
        "overlaps with a run that died before it could be told": early_deaths,
        "runs at once, at most": _most_at_once(runs),
        "faults": len(faults),
    }
    return Verdict(figures, wrong)


def _overlaps(runs: list[Run], witness: Witness) -> tuple[list[str], int, int]:
    """Give what is wrong, and how many overlaps are not: with a run that was told, or died too early for that."""
    wrong: list[str] = []
    told = early_deaths = 0
    by_key: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda one: one.token):
        by_key[run.key].append(run)
    for key, mine in by_key.items():
        for one, other in combinations(mine, 2):
            if one.token == other.token:
                wrong.append(f"{key}: jobs {one.job} and {other.job} have the same token, {one.token}")
            if one.end is not None and other.begin >= one.end:
                continue  # else `other` got the lock while the body of `one` ran, or before
            if one.lost is not None:
                told += 1
            elif one.killed and _is_soon(witness.lag(one, one.end or one.begin)):
                early_deaths += 1
            else:
                wrong.append(f"{key}: jobs {one.job} and {other.job} overlap, and {one.job} was told nothing")
    return wrong, told, early_deaths


def _is_soon(lag: float | None) -> bool:
    return lag is not None and lag <= TOLD


def _most_at_once(runs: list[Run]) -> int:
    moments = sorted(
        [(run.begin, 1) for run in runs] + [(run.end, -1) for run in runs if run.end is not None],
    )
    now = most = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most
