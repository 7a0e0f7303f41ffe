"""The judge: reads the log of the runs and the list of the faults, and knows nothing of locks.

In which order the runs of a key got the lock, their tokens say: a process may be stopped between the grant and the
first line of the body, and write that line long after its lock was lost and another run has begun.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

#: Seconds around a cut in which a run that begins or ends may or may not have been hit by it.
MARGIN = 0.1

#: Seconds that a process may have been stopped between the grant and the first line of the body.
STOPPED = 3.0


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
    """What was done to whom: `cuts` says which sessions it ended (None: none; empty: all; else those of these keys)."""

    name: str
    at: float
    until: float
    pids: tuple[int, ...] = ()
    cuts: tuple[str, ...] | None = None

    def hits(self, run: Run) -> bool:
        """Say whether the session of `run` was certainly ended by it, while the body ran."""
        if self.cuts is None or (self.cuts and run.key not in self.cuts):
            return False
        return run.begin < self.at - MARGIN and (run.end is None or run.end > self.until + MARGIN)

    def may_hit(self, run: Run) -> bool:
        """Say whether it can have been."""
        told = run.lost
        return self.cuts is not None and told is not None and run.begin - STOPPED < self.until and self.at < told


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
    deaths = {pid: fault.at for fault in faults if fault.name.startswith("kill") for pid in fault.pids}
    for one in runs.values():
        if one.end is None and one.pid in deaths:
            one.end, one.killed = deaths[one.pid], True
    return list(runs.values())


@dataclass
class Verdict:
    """What was found; each text of `wrong` is one violation."""

    figures: dict[str, int]
    wrong: list[str]


def judge(runs: list[Run], faults: list[Fault], jobs: set[int]) -> Verdict:
    """Judge: overlaps only after a loss that was told; losses told where sessions were cut; rising tokens; all done."""
    wrong: list[str] = []
    by_key: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda one: one.token):
        by_key[run.key].append(run)
    told_overlaps = early_deaths = 0
    for key, mine in by_key.items():
        for number, one in enumerate(mine):
            for other in mine[number + 1 :]:
                if one.end is not None and other.begin >= one.end:
                    continue  # else `other` got the lock while the body of `one` ran, or before
                if one.lost is not None:
                    told_overlaps += 1
                elif one.killed and any(fault.cuts is not None and one.begin < fault.until for fault in faults):
                    early_deaths += 1  # its session was cut, and it was killed before it could go on
                else:
                    wrong.append(f"{key}: jobs {one.job} and {other.job} overlap, and {one.job} was told nothing")
        wrong += [
            f"{key}: jobs {earlier.job} and {later.job} have the same token, {later.token}"
            for earlier, later in pairwise(mine)
            if later.token == earlier.token
        ]
    hit = [run for run in runs if not run.killed and any(fault.hits(run) for fault in faults)]
    wrong += [f"job {run.job} was told nothing, though its session was cut" for run in hit if run.lost is None]
    told = [run for run in runs if run.lost is not None]
    wrong += [
        f"job {run.job} was told of a loss without a cut" for run in told if not any(one.may_hit(run) for one in faults)
    ]
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
        "runs that were told of a loss": len(told),
        "overlaps with a run that was told": told_overlaps,
        "overlaps with a run that died before it could be told": early_deaths,
        "runs at once, of different keys, at most": _most_at_once(runs),
        "faults": len(faults),
    }
    return Verdict(figures, wrong)


def _most_at_once(runs: list[Run]) -> int:
    moments = sorted(
        [(run.begin, 1) for run in runs] + [(run.end, -1) for run in runs if run.end is not None],
    )
    now = most = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most
