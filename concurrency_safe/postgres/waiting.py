"""The loop that drives a rule for a thread: it blocks where the rule says, in slices.

Slices, because only the interpreter delivers signals and `PyThreadState_SetAsyncExc`: a wait inside C (libpq's,
or the one in psycopg's C module) keeps an exception pending for as long as it blocks. `select.poll` returns at once
for a signal, and after `SLICE` at the latest for an asynchronous exception.
"""

from __future__ import annotations

import math
import select
import time
from typing import TypeVar

from concurrency_safe.core.steps import READ, TURN, WRITE, CallWait, GateWait, Steps, Wait

#: Seconds that one blocking call may last. An interrupt is seen within 250 ms, also on a busy machine.
SLICE = 0.1

#: When greenlets had their turn last.
_turned_at = 0.0

_T = TypeVar("_T")


def take_turns() -> None:
    """Let other greenlets run, if none was let for `TURN` seconds; threads take turns by themselves."""
    global _turned_at  # noqa: PLW0603 - of the one thread that greenlets share
    sleep = time.sleep  # noqa: TID251 - for an instant
    if not (sleep.__module__ or "").startswith(("gevent", "eventlet")):
        return
    now = time.monotonic()
    if now - _turned_at > TURN:
        _turned_at = now
        sleep(1e-9)  # for 0, gevent doesn't look at its timers each time


def drive(steps: Steps[_T]) -> _T:
    """Run `steps` to its end, blocking the running thread where it waits.

    Raises: whatever the rule raises, or whatever interrupts the wait. The rule is closed then, so its `finally`
        and `except` blocks have run when the exception leaves here (they must not wait again).
    """
    try:
        want = next(steps)
        while True:
            want = steps.send(_wait(want))
    except StopIteration as stop:
        result: _T = stop.value
        return result
    finally:
        # Not left to the collector: a traceback would keep the rule, and what it holds, alive.
        steps.close()


def _wait(want: Wait) -> bool:
    """Block until `want` is there (True), or its time has passed (False)."""
    if isinstance(want, CallWait):
        want.call()
        return True
    until = want.until
    while True:
        left = math.inf if until is None else until - time.monotonic()
        slice_ = SLICE if left > SLICE else max(left, 0.0)
        if want.gate.wait(slice_) if isinstance(want, GateWait) else wait_socket(want.fd, want.events, slice_):
            return True
        if left <= slice_:
            return False


def has_hung_up(fd: int) -> bool:
    """Say, without reading, whether the other end has closed the connection; False where the system can't tell."""
    if not hasattr(select, "POLLRDHUP"):  # pragma: no cover - macOS, Windows
        return False
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


if hasattr(select, "poll"):
    _POLLED = {READ: select.POLLIN, WRITE: select.POLLOUT, READ | WRITE: select.POLLIN | select.POLLOUT}

    def wait_socket(fd: int, events: int, timeout: float) -> bool:
        """Say whether the socket became ready within `timeout` seconds; an error on it counts as ready.

        The name is looked up in `select` at each call: gevent replaces it, and the wait is cooperative then.
        """
        poll = select.poll()
        poll.register(fd, _POLLED[events])
        # Rounded up, or the last millisecond of a deadline would be spent spinning.
        return bool(poll.poll(timeout * 1000 + 0.999 if timeout else 0))

else:  # pragma: no cover - platforms without poll(): Windows, and eventlet's patched select

    def wait_socket(fd: int, events: int, timeout: float) -> bool:
        """Say whether the socket became ready within `timeout` seconds."""
        readable = [fd] if events & READ else []
        writable = [fd] if events & WRITE else []
        ready = select.select(readable, writable, [fd], timeout)
        return any(ready)
