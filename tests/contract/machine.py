"""Whatever happens in whatever order: never two holders, never a lock left. A model says what must be.

`python -m tests.contract.machine --seed 1 --seconds 300` runs it for that long, and prints how many steps it took.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Coroutine
from typing import Any, TypeVar

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from concurrency_safe import HeldLock, LockAcquireTimeout, LockLost
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.testing import PostgresServer
from tests.contract.worlds import Actor, Interrupt, TaskActor, ThreadActor, World

T = TypeVar("T")

KEYS = ("a", "b", "c", "d")
ACTORS = range(5)

#: Another process, which holds what it is told to until it is killed.
PROCESS = """
import sys
from concurrency_safe import LockAcquireTimeout, configure, lock
configure(dsn=sys.argv[1])
for line in sys.stdin:
    try:
        lock(*line.split(), timeout=0).acquire()
        print("held", flush=True)
    except LockAcquireTimeout:
        print("taken", flush=True)
"""

steps = itertools.count()


class Hold:
    """What the model believes."""

    def __init__(self, actor: object, keys: frozenset[str], held: HeldLock | None, *, shared: bool) -> None:
        self.actor = actor
        self.keys = keys
        self.shared = shared
        self.held = held


class Locks(RuleBasedStateMachine):
    """Threads, tasks and a process that acquire and release, are interrupted and killed, and lose their sessions."""

    dsn = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.backend = PostgresBackend(self.dsn, StoreOptions(pool_size=2))
        self.world = self.do(self._world())
        kinds = (ThreadActor, ThreadActor, ThreadActor, TaskActor, TaskActor)
        self.actors: list[Actor] = [self.do(self._actor(kind)) for kind in kinds]
        self.holds: list[Hold] = []
        self.process: subprocess.Popen[str] | None = None
        self.server = psycopg.connect(self.dsn, autocommit=True)

    async def _world(self) -> World:
        return World(ThreadActor, self.dsn, backend=self.backend)

    async def _actor(self, kind: type[Any]) -> Actor:
        self.world._actor = kind
        return self.world.actor()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def free(self, actor: object, keys: frozenset[str], *, shared: bool) -> bool:
        """Say by the model whether `actor` may have `keys` now."""
        return not any(one.keys & keys and one.actor is not actor and not (shared and one.shared) for one in self.holds)

    def enters_in_one_mode(self, actor: object, keys: frozenset[str], *, shared: bool) -> bool:
        return all(one.shared == shared for one in self.holds if one.actor is actor and one.keys & keys)

    @rule(
        number=st.sampled_from(ACTORS),
        keys=st.frozensets(st.sampled_from(KEYS), min_size=1, max_size=3),
        shared=st.booleans(),
        timeout=st.sampled_from([0.0, 0.02]),
    )
    def acquire(self, number: int, keys: frozenset[str], shared: bool, timeout: float) -> None:  # noqa: FBT001
        actor = self.actors[number]
        if not self.enters_in_one_mode(actor, keys, shared=shared):
            return
        expected = self.free(actor, keys, shared=shared)
        try:
            held = self.do(actor.acquire(*sorted(keys), shared=shared, timeout=max(timeout, 1.0 if expected else 0.0)))
        except LockAcquireTimeout:
            assert not expected, "a free lock was refused"
        else:
            assert expected, "two holders"
            held.check()
            self.holds.append(Hold(actor, keys, held, shared=shared))

    @precondition(lambda self: any(one.held for one in self.holds))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from([one for one in self.holds if one.held]))
        self.holds.remove(hold)
        self.do(hold.actor.release(hold.held))  # type: ignore[attr-defined]

    @precondition(lambda self: any(one.held for one in self.holds))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """Lose the object: as when an exception hits the first line of `__exit__`."""
        hold = data.draw(st.sampled_from([one for one in self.holds if one.held]))
        self.holds.remove(hold)
        from concurrency_safe.locks import _kept

        assert hold.held is not None
        _kept.discard(hold.held)
        hold.held = None
        del hold
        gc.collect()

    @rule(
        number=st.sampled_from(ACTORS),
        keys=st.frozensets(st.sampled_from(KEYS), min_size=1, max_size=2),
        pause=st.integers(0, 40),
    )
    def interrupt(self, number: int, keys: frozenset[str], pause: int) -> None:
        """Wait for what others hold, and be interrupted."""
        actor = self.actors[number]
        if self.free(actor, keys, shared=False) or not self.enters_in_one_mode(actor, keys, shared=False):
            return
        actor.started = False
        waiting = asyncio.run_coroutine_threadsafe(actor.acquire(*sorted(keys), timeout=None), self.loop)
        while not actor.started:
            pass
        for _ in range(pause):  # somewhere on its way
            self.server.execute("SELECT 1")
        actor.interrupt()
        try:
            waiting.result(10)
        except Interrupt:
            pass
        else:
            raise AssertionError("two holders")

    @precondition(lambda self: any(one.held for one in self.holds))
    @rule()
    def cut(self) -> None:
        """Lose every session of ours: whoever holds is told."""
        ours = [one for one in self.holds if one.held]
        self.server.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM (SELECT DISTINCT pid FROM pg_locks JOIN pg_stat_activity"
            " USING (pid) WHERE locktype = 'advisory' AND application_name LIKE %s) ours",
            [f"cs:%:{os.getpid()}"],
        )
        for hold in ours:
            assert hold.held is not None
            until = time.monotonic() + 1
            while not hold.held.is_lost:  # the end of the stream comes a moment after the end of the backend
                assert time.monotonic() < until
            try:
                self.do(hold.actor.release(hold.held))  # type: ignore[attr-defined]
            except LockLost:
                pass
            else:
                raise AssertionError("a loss that was not told")
            self.holds.remove(hold)

    @rule(keys=st.frozensets(st.sampled_from(KEYS), min_size=1, max_size=2))
    def other_process(self, keys: frozenset[str]) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, self.dsn], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        expected = self.free(self.process, keys, shared=False)
        self.process.stdin.write(" ".join(sorted(keys)) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().strip()
        assert said == ("held" if expected else "taken")
        if expected:
            self.holds.append(Hold(self.process, keys, None, shared=False))

    @precondition(lambda self: self.process is not None)
    @rule()
    def crash(self) -> None:
        self._kill()

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.communicate()
        self.holds = [one for one in self.holds if one.actor is not process]

    @invariant()
    def the_server_agrees(self) -> None:
        """Every lock that the model has, and no other, is in the server; nobody waits."""
        next(steps)
        wanted = {lock_key(key).number for one in self.holds for key in one.keys}
        until = time.monotonic() + 5
        while True:
            rows = self.server.execute(
                "SELECT (classid::bigint << 32) | objid::bigint, granted FROM pg_locks WHERE locktype = 'advisory'"
            ).fetchall()
            if {number for number, granted in rows} == wanted and all(granted for _, granted in rows):
                return
            assert time.monotonic() < until, f"the server has {rows}, the model {wanted}"

    def teardown(self) -> None:
        for hold in [one for one in self.holds if one.held]:
            self.do(hold.actor.release(hold.held))  # type: ignore[attr-defined]
            self.holds.remove(hold)
        self._kill()
        self.the_server_agrees()
        self.do(self.world.close())
        self.server.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def run(seed: int, seconds: float, examples: int) -> int:
    """Run the machine for at least so long; return the number of steps."""
    from hypothesis import seed as seeded

    began = next(steps)
    until = time.monotonic() + seconds
    with PostgresServer() as server:
        Locks.dsn = server.dsn
        for turn in itertools.count():
            machine = seeded(seed * 1000 + turn)(type("SeededLocks", (Locks,), {}))
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
            if time.monotonic() >= until:
                return next(steps) - began - 1
    raise AssertionError


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--examples", type=int, default=10)
    given = parser.parse_args()
    try:
        made = run(given.seed, given.seconds, given.examples)
    except BaseException:  # noqa: BLE001 - told, and the end
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the threads of a walk that failed may wait for ever
    print(f"seed {given.seed}: {made} steps, no failure")  # noqa: T201 - its only words
