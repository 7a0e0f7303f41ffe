"""What is done to the workers, the lock store and the network; which of it in which order, a seed decides."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from benchmarks.chaos.judge import Fault
from benchmarks.chaos.relay import Relay
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer

_T = TypeVar("_T")

#: Counts the library's own sessions.
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cs:%'"

#: Ends them, and counts them.
TERMINATE = SESSIONS.replace("count(*)", "count(pg_terminate_backend(pid))")

#: The advisory locks that are held.
HELD = "FROM pg_locks WHERE locktype = 'advisory' AND granted"

#: What is done, and how often compared with the others.
WEIGHTS = {
    "kill_one": 4,
    "kill_all": 1,
    "stop_one": 3,
    "terminate_one": 4,
    "terminate_all": 2,
    "restart_fast": 1,
    "restart_immediate": 1,
    "cut": 2,
    "hold_up": 1,
    "fill_locks": 1,
    "take_connections": 1,
}


@dataclass(frozen=True)
class Step:
    """One fault to come. `where`: whom it hits, as a part of all there are; `pause`: seconds until the next one.

    `seconds`: how long it lasts, where that is not in its nature.
    """

    verb: str
    where: float
    seconds: float
    pause: float


def plan(seed: int) -> Iterator[Step]:
    """Give the faults of `seed`, one after the other, without end; each takes as much chance as any other."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    while True:
        verb = chance.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        yield Step(verb, chance.random(), chance.uniform(0.3, 2.0), chance.uniform(0.8, 2.5))


def picked(among: Sequence[_T], where: float) -> _T:
    """Give the one of `among` that is at `where`, from 0 to below 1."""
    return among[int(where * len(among))]


class Faults:
    """The faults that there were, and the verbs that make more."""

    def __init__(
        self, seed: int, server: PostgresServer, relay: Relay, workers: Callable[[], Iterable[int]], keys: Iterable[str]
    ) -> None:
        """Hurt `server`, what goes through `relay`, and the processes below the pids that `workers` gives."""
        self._plan = plan(seed)
        self._server = server
        self._relay = relay
        self._workers = workers
        self._names = {lock_key(f"chaos:{key}").number: key for key in keys}
        self._stopped: set[int] = set()
        self.done: list[Fault] = []

    def next(self) -> float:
        """Do the next one; give the seconds until the one after it."""
        step = next(self._plan)
        getattr(self, step.verb)(step)
        return step.pause

    def _note(
        self,
        name: str,
        at: float,
        *,
        pids: tuple[int, ...] = (),
        cuts: tuple[str, ...] | None = None,
        sessions: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.done.append(Fault(name, at, time.monotonic() + seconds, pids, cuts, sessions))

    # Processes.

    def kill_one(self, step: Step) -> None:
        """Kill one process of a worker."""
        pids = [pid for worker in self._workers() for pid in descendants(worker)]
        if pids:
            self._kill("kill one", [picked(sorted(pids), step.where)])

    def kill_all(self, step: Step) -> None:
        """Kill a worker with all its processes."""
        worker = picked(sorted(self._workers()), step.where)
        self._kill("kill a worker", [worker, *descendants(worker)])

    def _kill(self, name: str, pids: list[int]) -> None:
        at = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._note(name, at, pids=tuple(pids))

    def stop_one(self, step: Step) -> None:
        """Stop one process for a while."""
        pids = sorted({pid for worker in self._workers() for pid in descendants(worker)} - self._stopped)
        if not pids:
            return
        pid = picked(pids, step.where)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._stopped.add(pid)
            threading.Timer(step.seconds, self._continue, [pid]).start()
            self._note("stop one", time.monotonic(), pids=(pid,), seconds=step.seconds)

    def _continue(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self._stopped.discard(pid)

    # The lock store.

    def terminate_one(self, step: Step) -> None:
        """End the session of one holder."""
        self._terminate(step.where)

    def terminate_all(self, _: Step) -> None:
        """End the sessions of all holders."""
        self._terminate(None)

    def _terminate(self, where: float | None) -> None:
        with psycopg.connect(self._server.dsn, autocommit=True) as connection:
            pids = [pid for (pid,) in connection.execute(f"SELECT DISTINCT pid {HELD} ORDER BY pid")]
            chosen = pids if where is None or not pids else [picked(pids, where)]
            at = time.monotonic()
            # What they hold is read in that moment: a session is soon another lock's.
            ended = connection.execute(
                f"SELECT pid, (classid::int8 << 32) | objid::int8, pg_terminate_backend(pid) {HELD} AND pid = ANY(%s)",
                [chosen],
            ).fetchall()
        keys = tuple(sorted(self._names[number] for _, number, _ in ended if number in self._names))
        if keys:
            self._note("terminate", at, cuts=keys, sessions=len({pid for pid, _, _ in ended}))

    def restart_fast(self, _: Step) -> None:
        """Restart the server; everybody is disconnected."""
        self._restart("fast")

    def restart_immediate(self, _: Step) -> None:
        """Let the server crash, and recover."""
        self._restart("immediate")

    def _restart(self, mode: str) -> None:
        with psycopg.connect(self._server.dsn, autocommit=True) as connection:
            (sessions,) = connection.execute(SESSIONS).fetchone() or (0,)
        at = time.monotonic()
        self._server.restart(mode)
        self._note(f"restart, {mode}", at, cuts=(), sessions=sessions)

    def fill_locks(self, _: Step) -> None:
        """Leave no room in the server's lock table for a while."""
        at = time.monotonic()
        with psycopg.connect(self._server.dsn, autocommit=True) as connection:
            number = 1 << 40
            step = 512
            while step:
                try:
                    connection.execute(
                        "SELECT pg_advisory_lock(n) FROM generate_series(%s::int8, %s) n", [number, number + step - 1]
                    )
                    number += step
                except psycopg.errors.OutOfMemory:
                    number += step  # a part of it is held
                    step //= 8
            connection.execute("SELECT pg_sleep(0.5)")
        self._note("fill the lock table", at)

    def take_connections(self, _: Step) -> None:
        """End every session of the workers, and take every connection that the server gives, for a while."""
        at = time.monotonic()
        taken: list[psycopg.Connection[Any]] = []
        try:
            self._take_all(taken)
            began = time.monotonic()
            (sessions,) = taken[0].execute(TERMINATE).fetchone() or (0,)
            self._note("terminate all sessions", began, cuts=(), sessions=sessions)
            self._take_all(taken)
            taken[0].execute("SELECT pg_sleep(0.7)")
        finally:
            for connection in taken:
                connection.close()
        self._note("take all connections", at)

    def _take_all(self, taken: list[psycopg.Connection[Any]]) -> None:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                taken.append(psycopg.connect(self._server.dsn, autocommit=True))

    # The network.

    def cut(self, _: Step) -> None:
        """Reset every connection to the lock store."""
        at = time.monotonic()
        sessions = self._relay.cut()
        self._note("cut the network", at, cuts=(), sessions=sessions)

    def hold_up(self, step: Step) -> None:
        """Let nothing pass between the workers and the lock store for a while."""
        at = time.monotonic()
        self._relay.hold_up(step.seconds)
        self._note("hold up the network", at)


def descendants(pid: int) -> list[int]:
    """Give the processes below `pid`."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, thread.read_text().split()):
                found += [child, *descendants(child)]
    return found
