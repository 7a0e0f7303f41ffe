"""Who hears what happens to locks. Called by `locks` only; a listener can neither change nor break a lock.

A conflict is everyday business: one line at INFO. A lost lock is an ERROR.
"""

from __future__ import annotations

import logging
import threading
import traceback
from contextvars import ContextVar
from queue import SimpleQueue

from concurrency_safe import forks
from concurrency_safe.core.events import Hook, LockEvent

logger = logging.getLogger("concurrency_safe")

#: Seconds that `emit_apart` waits for the log and the hooks.
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


def emit_apart(event: LockEvent) -> None:
    """Do the same for the watcher of sessions, which waits for `PATIENCE` seconds at most.

    The log and the hooks can hang (a log may be a pipe that nobody reads any more), and the owners of other locks have
    to hear of their loss nevertheless.
    """
    global _teller  # noqa: PLW0603 - one a process
    try:
        if _teller is None or _teller.pid != forks.pid:
            _teller = _Teller()
    except RuntimeError:  # there is room for no more threads, or the interpreter ends
        emit(event)
    else:
        _teller.tell(event)


class _Teller:
    """A thread that tells one event after the other."""

    def __init__(self) -> None:
        """Raise RuntimeError, when it can't be started."""
        self.pid = forks.pid
        self._events: SimpleQueue[tuple[LockEvent, threading.Event]] = SimpleQueue()
        self._is_busy = False
        threading.Thread(target=self._run, name="concurrency_safe teller", daemon=True).start()

    def tell(self, event: LockEvent) -> None:
        """Queue `event`; wait until it was told, unless an earlier one hangs."""
        told = threading.Event()
        hangs, self._is_busy = self._is_busy, True
        self._events.put((event, told))
        if not hangs:
            told.wait(PATIENCE)

    def _run(self) -> None:
        while True:
            event, told = self._events.get()
            try:
                emit(event)
            except BaseException:  # noqa: BLE001 - a filter's or a handler's; as logging does with one
                traceback.print_exc()
            self._is_busy = False
            told.set()


_teller: _Teller | None = None
