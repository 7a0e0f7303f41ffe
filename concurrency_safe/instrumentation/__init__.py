"""Who hears what happens to locks. Called by `locks` only; a listener can neither change nor break a lock.

A conflict is everyday business: one line at INFO. A lost lock is an ERROR.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue

from concurrency_safe import forks, threads
from concurrency_safe.core.events import Hook, LockEvent

logger = logging.getLogger("concurrency_safe")

#: Seconds that `tell_apart` waits for the log and the hooks.
PATIENCE = 0.5


def log_event(event: LockEvent) -> None:
    """Write conflicts and losses to the logger `concurrency_safe`, with the event's fields in `extra`."""
    extra = {"lock_event": event.kind, "lock_keys": event.keys, "lock_holder": event.holder}
    if event.kind == "conflicted":
        logger.info(
            "lock %s is taken (%s)",
            ", ".join(map(repr, event.keys)),
            event.holder or "holder unknown",
            extra=extra,
        )
    elif event.kind == "lost":
        logger.error("lock %s was lost while it was held", ", ".join(map(repr, event.keys)), extra=extra)


#: Who listens, besides the log.
hooks: tuple[Hook, ...] = ()


def add_hook(hook: Hook) -> None:
    """Let `hook` hear every event from now on, in this process. What it raises is logged, and goes no further."""
    global hooks  # noqa: PLW0603 - one list a process, replaced as a whole
    hooks = (*hooks, hook)


def remove_hook(hook: Hook) -> None:
    """Let `hook` hear no more."""
    global hooks  # noqa: PLW0603 - see add_hook
    hooks = tuple(other for other in hooks if other != hook)  # a method is a new object each time


#: Where conflicts wait until they are told, while an exception may strike the running thread at any moment (Dramatiq's
#: time limits): it would leave the lock of a log's handler locked for ever. None: they are told at once.
conflicts: ContextVar[list[LockEvent] | None] = ContextVar("concurrency_safe_conflicts", default=None)


def emit(event: LockEvent) -> None:
    """Tell everybody who listens."""
    waiting = conflicts.get()
    if waiting is not None and event.kind == "conflicted":
        waiting.append(event)
        return
    log_event(event)
    for hook in hooks:
        try:
            hook(event)
        except Exception:
            logger.exception("the hook %r failed on %r", hook, event.kind)


def tell_apart(call: Callable[[], object]) -> None:
    """Let another thread tell something, by `call()`, and wait for that; for `PATIENCE` seconds at most.

    The log and the hooks can hang (a log may be a pipe that nobody reads any more), and whoever noticed a loss has to
    go on nevertheless: the owners of the lock, and of others on the same session, hear of it from the same thread.
    """
    global _teller  # noqa: PLW0603 - one a process
    teller = _teller
    if teller is None or teller.pid != forks.pid:
        teller = _teller = _Teller()
    teller.tell(call)


class _Teller:
    """A thread that tells one thing after the other."""

    def __init__(self) -> None:
        self.pid = forks.pid
        self._calls: SimpleQueue[tuple[Callable[[], object], threading.Event]] = SimpleQueue()
        self._hangs = False
        self._only = threading.Lock()

    def tell(self, call: Callable[[], object]) -> None:
        """Queue `call`, with the context variables of now; wait until it was told, unless an earlier one hangs."""
        told = threading.Event()
        self._calls.put((partial(copy_context().run, call), told))
        try:
            if not self._only.locked():
                threads.start(self._run, "concurrency_safe teller")
        except RuntimeError:
            with suppress(Empty):
                self._next(block=False)
        if not self._hangs and not told.wait(PATIENCE):
            self._hangs = True

    def _run(self) -> None:
        if self._only.acquire(blocking=False):
            while True:
                self._next(block=True)

    def _next(self, *, block: bool) -> None:
        call, told = self._calls.get(block)
        try:
            call()
        except BaseException:  # noqa: BLE001 - a filter's or a handler's; as logging does with one
            traceback.print_exc()
        self._hangs = False
        told.set()


_teller: _Teller | None = None
