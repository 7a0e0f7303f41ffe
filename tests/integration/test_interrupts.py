"""Exceptions that come from outside, at any time: nothing is left behind, and they surface at once.

Each kind is thrown hundreds of times at random moments around the grant: while a session waits, as it is granted the
lock, in the body, and in the release.
"""

from __future__ import annotations

import ctypes
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from concurrency_safe import lock
from tests.integration.conftest import LIMIT, LockStore, Rival, bare_environment, wait_for

ROUNDS = 500

#: Seconds within which an interrupt must surface; the promise of the library.
SURFACES = 0.25


class Interrupt(Exception):
    """What a signal handler or another thread raises in the middle of anything."""


@contextmanager
def unmeasured() -> Iterator[None]:
    """Keep coverage out of the running thread: interrupted in its own bookkeeping, it never frees the lock of that."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def handler(raised: type[BaseException], times: list[float]) -> Iterator[None]:
    """Let SIGALRM raise `raised`, and write down when."""

    def on_alarm(_number: int, _frame: object) -> None:
        times.append(time.monotonic())
        raise raised

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with unmeasured():
            yield
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def grants(rival: Rival, stop: threading.Event, key: str) -> threading.Thread:
    """Hold `key` from another session, and let go of it again and again, at random moments."""

    def hold_and_let_go() -> None:
        chance = random.Random(7)
        while not stop.is_set():
            rival.hold(key)
            stop.wait(chance.uniform(0, 0.004))
            rival.let_go()

    thread = threading.Thread(target=hold_and_let_go)
    thread.start()
    return thread


@pytest.mark.parametrize("raised", [KeyboardInterrupt, Interrupt])
@pytest.mark.timeout(150)
def test_signal_handlers_leave_nothing_behind(raised: type[BaseException], store: LockStore, rival: Rival) -> None:
    stop = threading.Event()
    granting = grants(rival, stop, "one")
    chance = random.Random(11)
    late: list[float] = []
    hits = 0
    try:
        for _ in range(ROUNDS):
            times: list[float] = []
            with handler(raised, times):
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.008))
                    until = time.monotonic() + LIMIT
                    while time.monotonic() < until:
                        with lock("one", timeout=None):
                            pass
                except raised:
                    hits += 1
                    late.append(time.monotonic() - times[0])
    finally:
        stop.set()
        granting.join()

    assert hits == ROUNDS
    assert max(late) < SURFACES
    wait_for(lambda: store.rows() == 0, 1.0)
    assert rival.is_free("one")


@pytest.mark.timeout(150)
def test_asynchronous_exceptions_leave_nothing_behind(dsn: str, store: LockStore, rival: Rival) -> None:
    command = [sys.executable, "-m", "tests.integration.interrupted", dsn]
    environment = {**bare_environment(), "COVERAGE_PROCESS_CONFIG": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        late = json.loads(process.stdout.readline())
        assert len(late) == 4 * ROUNDS
        assert max(late) < SURFACES
        wait_for(lambda: store.rows() == 0, 1.0)
        assert rival.is_free("one")
        assert rival.is_free("two")
        process.communicate()
    assert process.returncode == 0


def throw(thread: threading.Thread, raised: type[BaseException]) -> int:
    """Raise `raised` in `thread`, as dramatiq does at a time limit."""
    ident = ctypes.c_ulong(thread.ident or 0)
    hit: int = ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(raised))
    return hit


def test_a_wait_in_the_server_is_left_at_once(store: LockStore, rival: Rival) -> None:
    """Also where neither a grant nor a deadline comes to the rescue."""
    rival.hold("one")
    thrown: list[float] = []

    def fire() -> None:
        wait_for(lambda: store.waiting() == 1)
        signal.raise_signal(signal.SIGALRM)

    alarm = threading.Thread(target=fire)
    with handler(Interrupt, thrown):
        alarm.start()
        with pytest.raises(Interrupt), lock("one", timeout=None):
            pytest.fail("two holders")
        surfaced = time.monotonic()
        alarm.join()

    assert surfaced - thrown[0] < SURFACES
    wait_for(lambda: store.waiting() == 0, 1.0)


@pytest.mark.parametrize("where", ["server", "process"])
def test_an_asynchronous_exception_ends_a_wait_at_once(where: str, store: LockStore, rival: Rival) -> None:
    held = lock("one").acquire() if where == "process" else None
    if held is None:
        rival.hold("one")
    surfaced: list[float] = []

    def wait() -> None:
        sys.settrace(None)  # see unmeasured
        with pytest.raises(Interrupt), lock("one", timeout=None):
            pytest.fail("two holders")
        surfaced.append(time.monotonic())

    def waits() -> bool:
        if held is None:
            return store.waiting() == 1
        claims = held._footing.ownership
        return claims is not None and claims.waiting(held._keys[0]) == 1

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_for(waits)
    thrown = time.monotonic()
    throw(waiter, Interrupt)
    waiter.join()

    assert surfaced[0] - thrown < SURFACES
    if held is not None:
        held.release()
    rival.let_go()
    wait_for(lambda: store.rows() == 0, 1.0)
