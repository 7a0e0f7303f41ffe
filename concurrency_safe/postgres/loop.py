"""The loop that drives a rule for an asyncio task: where the rule waits, the event loop goes on.

Cancellation arrives at the wait; the rule is closed then, and what it left is undone by `finish`, which a further
cancellation does not stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from concurrency_safe.core.steps import READ, TURN, WRITE, CallWait, GateWait, Steps, Wait

if TYPE_CHECKING:
    from typing import Any

_T = TypeVar("_T")

#: Seconds of a wait without end: a rule looks around when it is over, and waits again.
A_LONG_TIME = 3600.0

#: Clean-ups under way; kept, since an event loop has weak references to its tasks only.
_finishing: set[asyncio.Future[Any]] = set()


class _Turn(threading.local):
    """The turn of this thread's event loop that is under way."""

    #: When a task began to take locks in it; None: no one has yet.
    since: float | None = None


_turn = _Turn()


def _end_turn() -> None:
    _turn.since = None


async def atake_turns() -> None:
    """Let other tasks run, if one has taken or released locks for `TURN` seconds and none had to wait.

    Each answer may be there at once, and then nothing in `adrive` gives way to others: beside a busy thread, or with
    bodies that block, the loop would stand still for seconds.
    """
    since = _turn.since
    if since is None:
        _turn.since = time.monotonic()
        asyncio.get_running_loop().call_soon(_end_turn)
    elif time.monotonic() - since > TURN:
        await asyncio.sleep(0)
        if _turn.since == since:  # that of an earlier loop, which ended before its turn did
            _end_turn()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Give the event loop that runs in this thread, or None."""
    return asyncio._get_running_loop()  # noqa: SLF001 - documented as public for this purpose, and never raises


async def adrive(steps: Steps[_T]) -> _T:
    """Run `steps` to its end, letting other tasks run where it waits.

    Raises: whatever the rule raises, and CancelledError. The rule is closed then; its clean-up must not wait again.
    """
    try:
        want = next(steps)
        while True:
            want = steps.send(await _wait(want))
    except StopIteration as stop:
        result: _T = stop.value
        return result
    finally:
        steps.close()


async def finish(steps: Steps[None]) -> None:
    """Run a clean-up to its end, also when the task is cancelled once more meanwhile."""
    task = asyncio.ensure_future(adrive(steps))
    _finishing.add(task)
    task.add_done_callback(_finishing.discard)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def call(blocking: Callable[[], _T]) -> _T:
    """Call what blocks in a thread of its own: the loop's may all be busy, and after a fork a kept one would be gone.

    Raises: what `blocking` raises.
    """
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, blocking)
    finally:
        thread.shutdown(wait=False)


async def _wait(want: Wait) -> bool:
    """Wait until `want` is there (True), or its time has passed (False)."""
    loop = asyncio.get_running_loop()
    if isinstance(want, CallWait):
        await call(want.call)
        return True
    left = A_LONG_TIME if want.until is None else max(0.0, want.until - time.monotonic())
    if isinstance(want, GateWait):
        return bool(await want.gate.wait(left))
    ready: asyncio.Future[bool] = loop.create_future()
    # An interrupt may have left a reader of an earlier session, whose socket had the same number.
    _forget(loop, want.fd)
    timer = loop.call_later(left, partial(_set, ready, came=False))
    try:
        if want.events & READ:
            loop.add_reader(want.fd, partial(_set, ready, came=True))
        if want.events & WRITE:
            loop.add_writer(want.fd, partial(_set, ready, came=True))
        return await ready
    finally:
        timer.cancel()
        _forget(loop, want.fd)


def _forget(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # the socket was closed meanwhile
        loop.remove_reader(fd)
        loop.remove_writer(fd)


def _set(ready: asyncio.Future[bool], *, came: bool) -> None:
    if not ready.done():
        ready.set_result(came)
