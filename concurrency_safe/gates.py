"""Gates: what one waiter of this process stands at until another opens it, from whatever thread or event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class ThreadGate:
    """A gate for a thread (for a greenlet, when gevent has patched `threading`)."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        """Make it closed."""
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through."""
        with contextlib.suppress(RuntimeError):  # it is open already
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds; True when the gate was opened; it is closed again then."""
        return self._lock.acquire(timeout=timeout)


class LoopGate:
    """A gate for a task of an event loop."""

    __slots__ = ("_event", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make it closed."""
        self._loop = loop
        self._event = asyncio.Event()

    def open(self) -> None:
        """Let the waiter through; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its waiter with it
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; True when the gate was opened; it is closed again then."""
        timer = self._loop.call_later(timeout, self._event.set) if not self._event.is_set() else None
        until = self._loop.time() + timeout
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._event.clear()
        return timer is None or self._loop.time() < until


def gate_for(loop: asyncio.AbstractEventLoop | None) -> ThreadGate | LoopGate:
    """Make a gate for a waiter of `loop`; None: for a thread."""
    return ThreadGate() if loop is None else LoopGate(loop)


def is_owned(mutex: threading.RLock) -> bool:
    """Say whether the running thread is inside `mutex`; as `threading.Condition` asks."""
    owned: bool = mutex._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001 - see above
    return owned
