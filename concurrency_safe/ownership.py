"""Who owns which key inside this process.

Two sessions of one process exclude each other in the server, but one session is granted a lock that it holds already.
So a key belongs to one owner of this process before the server is asked, whatever session will hold it; the others
queue here, first come first served, and only one of them stands in the server's queue.

Every step survives an exception that a signal handler or `PyThreadState_SetAsyncExc` raises between two calls: what was
done is written down before it takes effect, and leaving twice is the same as leaving once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from concurrency_safe.core.errors import ConfigurationError, LockCapacityError
from concurrency_safe.core.steps import GateWait, Steps

if TYPE_CHECKING:
    from concurrency_safe.core.keys import LockKey
    from concurrency_safe.core.sessions import LockSession

#: Seconds after which a waiter looks for itself whether it is its turn: the bell can be lost when its ringer is
#: interrupted between two calls.
LOOK_AGAIN = 0.25


class ThreadGate:
    """A gate for a thread (for a greenlet, when gevent has patched `threading`)."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        """Make it closed."""
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through."""
        if self._lock.locked():
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds; True when the gate was opened."""
        return self._lock.acquire(timeout=timeout)


class Claim:
    """One owner's hold on one key, or its place in the queue."""

    __slots__ = ("count", "gate", "gone", "key", "owner", "queue", "session", "work")

    def __init__(self, key: LockKey, owner: object, work: str | None) -> None:
        """Claim `key` for `owner`; nothing is owned yet. `work`: whose work it is for (a task's id), or None."""
        self.key = key
        self.owner = owner
        self.work = work
        #: How many acquisitions of the owner stand on this claim; 0 while it waits.
        self.count = 0
        #: The session that holds the lock in the server, or is about to.
        self.session: LockSession | None = None
        self.gate = ThreadGate()
        self.gone = False
        self.queue: deque[Claim] | None = None


class Footing:
    """What one acquisition stands on, written down step by step, so that it can be undone at any point."""

    __slots__ = ("claim", "counted", "ownership", "work")

    def __init__(self, work: str | None) -> None:
        """Stand on nothing. `work`: see `Claim`."""
        self.work = work
        self.ownership: Ownership | None = None
        self.claim: Claim | None = None
        #: Whether `claim.count` counts this acquisition.
        self.counted = False

    def drop(self) -> None:
        """Undo whatever was reached. Twice is the same as once."""
        if self.ownership is not None:
            self.ownership.drop(self)


class Ownership:
    """The claims of one lock space in this process."""

    def __init__(self, max_held: int) -> None:
        """Let at most `max_held` keys be held at once."""
        self._max_held = max_held
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._claims: dict[int, Claim] = {}
        # Re-entrant: the collector may run a finalizer, which leaves, while this thread is in here.
        self._mutex = threading.RLock()

    def find(self, key: LockKey, owner: object) -> Claim | None:
        """Give the claim on which `owner` holds `key` already.

        Raises: ConfigurationError: another key of this process has the same number.
        """
        if self._pid != os.getpid():
            self._reset()  # a forked child owns nothing
        claim = self._claims.get(key.number)
        if claim is None or claim.owner != owner or not claim.count:
            return None
        _refuse_collision(claim.key, key)
        return claim

    def enter(self, footing: Footing, key: LockKey, owner: object, deadline: float | None) -> Steps[Claim | None]:
        """Make `owner` the one of this process who may take `key`, by the monotonic time `deadline` (None: whenever).

        Returns: None, or the claim of the one who kept it past the deadline.
        Raises: LockCapacityError, ConfigurationError.
        """
        footing.ownership = self
        held = self.find(key, owner)
        if held is not None:
            # No call in these three lines, so no exception can come between them.
            footing.claim = held
            held.count += 1
            footing.counted = True
            return None
        mine = footing.claim = Claim(key, owner, footing.work)
        with self._mutex:
            if len(self._claims) >= self._max_held and key.number not in self._claims:
                raise LockCapacityError(
                    f"this process holds {len(self._claims)} locks, which is its cap (MAX_HELD={self._max_held}); "
                    "hold fewer at a time, or raise MAX_HELD and PostgreSQL's max_locks_per_transaction",
                    key.text,
                )
            current = self._claims.setdefault(key.number, mine)
            if current is not mine:
                _refuse_collision(current.key, key)
                if current.queue is None:
                    current.queue = deque()
                mine.queue = current.queue
                mine.queue.append(mine)
        while (blocker := self._claims.get(key.number)) is not mine:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return blocker
            again = now + LOOK_AGAIN
            yield GateWait(mine.gate, again if deadline is None else min(again, deadline))
        mine.count = 1
        footing.counted = True
        return None

    def drop(self, footing: Footing) -> None:
        """Undo what `footing` says; the session of a claim ends with the last acquisition that stands on it."""
        claim = footing.claim
        if claim is None or self._pid != os.getpid():
            return
        if footing.counted:
            claim.count -= 1
            footing.counted = False
        if claim.count == 0:
            try:
                session, claim.session = claim.session, None
                if session is not None:
                    session.discard()
            finally:
                self.leave(claim)
        footing.claim = None

    def leave(self, claim: Claim) -> None:
        """Give up the key, or the place in the queue; the first in the queue is the next owner."""
        with self._mutex:
            claim.gone = True
            queue = claim.queue
            if self._claims.get(claim.key.number) is not claim:
                if queue and claim in queue:
                    queue.remove(claim)
                return
            while queue:
                heir = queue[0]
                if not heir.gone:
                    self._claims[claim.key.number] = heir
                queue.popleft()
                if not heir.gone:
                    heir.gate.open()
                    return
            del self._claims[claim.key.number]


def current_owner() -> object:
    """Say who is running: the asyncio task, or else the thread (the greenlet, when gevent has patched `threading`).

    The objects themselves, since a number is used again after its thread's end.
    """
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 - documented as public for this purpose, and never raises
        task = asyncio.current_task()
        if task is not None:
            return task
    return threading.current_thread()


def _refuse_collision(held: LockKey, wanted: LockKey) -> None:
    if held.text != wanted.text:
        raise ConfigurationError(
            f"the keys {held.text!r} and {wanted.text!r} have the same number {held.number}: "
            "a rare accident of hashing; rename one of them",
            wanted.text,
        )
