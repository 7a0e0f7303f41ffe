"""What is done to the workers, the lock store and the network; which of it when, a seed decides."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psycopg

from benchmarks.chaos.judge import Fault
from benchmarks.chaos.relay import Relay
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer


class Faults:
    """The faults that there were, and the verbs that make more."""

    def __init__(
        self, seed: int, server: PostgresServer, relay: Relay, workers: Callable[[], Iterable[int]], keys: Iterable[str]
    ) -> None:
        """Hurt `server`, what goes through `relay`, and the processes below the pids that `workers` gives."""
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._server = server
        self._relay = relay
        self._workers = workers
        self._names = {lock_key(f"chaos:{key}").number: key for key in keys}
        self._stopped: set[int] = set()
        self.done: list[Fault] = []

    def next(self) -> float:
        """Do the next one; give the seconds until the one after it."""
        verb, weight = zip(*self._verbs(), strict=True)
        self._chance.choices(verb, weight)[0]()
        return self._chance.uniform(0.8, 2.5)

    def _verbs(self) -> list[tuple[Callable[[], None], float]]:
        return [
            (self.kill_one, 4),
            (self.kill_all, 1),
            (self.stop_one, 3),
            (self.terminate_one, 4),
            (self.terminate_all, 2),
            (self.restart_fast, 1),
            (self.restart_immediate, 1),
            (self.cut, 2),
            (self.fill_locks, 1),
            (self.take_connections, 1),
        ]

    def _note(self, name: str, at: float, **fields: tuple[int, ...] | tuple[str, ...]) -> None:
        self.done.append(Fault(name, at, time.monotonic(), **fields))  # type: ignore[arg-type]  # each by its name

    # Processes.

    def kill_one(self) -> None:
        """Kill one process of a worker."""
        pids = [pid for worker in self._workers() for pid in descendants(worker)]
        if pids:
            self._kill("kill one", [self._chance.choice(sorted(pids))])

    def kill_all(self) -> None:
        """Kill a worker with all its processes."""
        worker = self._chance.choice(sorted(self._workers()))
        self._kill("kill a worker", [worker, *descendants(worker)])

    def _kill(self, name: str, pids: list[int]) -> None:
        at = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._note(name, at, pids=tuple(pids))

    def stop_one(self) -> None:
        """Stop one process for a while."""
        pids = sorted({pid for worker in self._workers() for pid in descendants(worker)} - self._stopped)
        if not pids:
            return
        pid = self._chance.choice(pids)
        seconds = self._chance.uniform(0.3, 2.0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._stopped.add(pid)
            threading.Timer(seconds, self._continue, [pid]).start()
            self._note("stop one", time.monotonic(), pids=(pid,))

    def _continue(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self._stopped.discard(pid)

    # The lock store.

    def terminate_one(self) -> None:
        """End the session of one holder."""
        self._terminate(1)

    def terminate_all(self) -> None:
        """End the sessions of all holders."""
        self._terminate(100)

    def _terminate(self, most: int) -> None:
        at = time.monotonic()
        with psycopg.connect(self._server.dsn, autocommit=True) as connection:
            held = connection.execute(
                "SELECT pid, (classid::int8 << 32) | objid::int8 FROM pg_locks "
                "WHERE locktype = 'advisory' AND granted ORDER BY 2"
            ).fetchall()
            pids = sorted({pid for pid, _ in held})
            chosen = self._chance.sample(pids, min(most, len(pids)))
            for pid in chosen:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        keys = tuple(self._names[number] for pid, number in held if pid in chosen and number in self._names)
        if keys:
            self._note("terminate", at, cuts=keys)

    def restart_fast(self) -> None:
        """Restart the server; everybody is disconnected."""
        self._restart("fast")

    def restart_immediate(self) -> None:
        """Let the server crash, and recover."""
        self._restart("immediate")

    def _restart(self, mode: str) -> None:
        at = time.monotonic()
        self._server.restart(mode)
        self._note(f"restart, {mode}", at, cuts=())

    def fill_locks(self) -> None:
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

    def take_connections(self) -> None:
        """Take every connection that the server gives, for a while."""
        at = time.monotonic()
        taken = []
        try:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    taken.append(psycopg.connect(self._server.dsn, autocommit=True))
            if taken:
                taken[0].execute("SELECT pg_sleep(0.7)")
        finally:
            for connection in taken:
                connection.close()
        self._note("take all connections", at)

    # The network.

    def cut(self) -> None:
        """Reset every connection to the lock store."""
        at = time.monotonic()
        self._relay.cut()
        self._note("cut the network", at, cuts=())


def descendants(pid: int) -> list[int]:
    """Give the processes below `pid`."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, thread.read_text().split()):
                found += [child, *descendants(child)]
    return found
