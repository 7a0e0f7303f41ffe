"""The few sessions of one process and one database: opened when needed, shared by the locks held, closed when idle.

A session has one user at a time, for as long as a statement is under way; the others queue for their turn. Whoever
can't prove that what it leaves is clean ends the session.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from concurrency_safe import forks, threads
from concurrency_safe.core.steps import GateWait, Steps
from concurrency_safe.gates import is_owned

from .protocol import STALL, ServerGoneError
from .session import LockSession

if TYPE_CHECKING:
    from concurrency_safe.core.sessions import Borrower, Hold

#: Seconds after which somebody who waits for a turn looks for itself (see `ownership.LOOK_AGAIN`).
LOOK_AGAIN = 0.05

#: Seconds in the queue after which a session that becomes free is kept for whoever waits, at most so often; and for how
#: long. Until then it is the turn of whoever comes first: a thread that runs does many statements in the time
#: that it takes to wake another one. But that one must not come too late for ever; and it may not come at all, since
#: its thread is in a signal's handler, or its event loop busy.
PATIENCE, KEPT = 0.002, 0.02

#: How often, in the time that an idle session is kept, the end of a turn looks for those that are idle for longer.
PRUNES = 10


class SessionPool:
    """The sessions of one database, and whose turn it is on them."""

    def __init__(self, opened: Callable[[], Steps[LockSession]], size: int, max_idle: float) -> None:
        """Open sessions by `opened`; keep at most `size`, an idle one for at most `max_idle` seconds."""
        self._opened = opened
        self._size = max(size, 1)
        self._kept = size
        self._max_idle = max_idle
        self._reset()

    def _reset(self) -> None:
        self._pid = forks.pid
        self.sessions: list[LockSession] = []
        self._opening: set[Borrower] = set()
        #: Who waits for a turn, the first first: on this session, or (None) on one that serves these numbers and name;
        #: and since when.
        self._queue: dict[Borrower, tuple[LockSession | None, Sequence[int], str, float]] = {}
        #: For whom a session is kept, and until when; and when that began last.
        self._kept_for: dict[LockSession, tuple[Borrower, float]] = {}
        self._kept_at = 0.0
        #: When the end of a turn looks again for sessions that are idle for too long.
        self._prune_at = 0.0
        # Re-entrant: the collector may come while this thread is in here.
        self.mutex = threading.RLock()

    def is_amid_change(self) -> bool:
        """Say whether the running thread is in the middle of a change."""
        return is_owned(self.mutex)

    def lend(self, borrower: Borrower, numbers: Sequence[int], name: str, *, empty: bool) -> Steps[LockSession]:
        """Give `borrower` a session that holds none of `numbers`; `empty`: one that holds nothing at all.

        Sessions are shared by locks of one `name` (whose work they are for) and of one event loop, or of threads. A
        new one is opened while there are fewer than the pool's size, or when none of them would do even at rest.

        Raises: ServerGoneError: no turn came. LockUnavailable, ConfigurationError: no session could be opened.
        """
        if self._pid != forks.pid:
            self._reset()  # the sockets are closed already (protocol._drop_in_child)
        since = time.monotonic()
        until = since + STALL
        try:
            while True:
                with self.mutex:
                    session = self._pick(borrower, numbers, name, empty=empty)
                    if session is not None:
                        return session
                    if empty or self._may_open(borrower, numbers, name):
                        self._opening.add(borrower)
                        break
                    self._queue[borrower] = (None, numbers, name, since)
                yield from self._turn(borrower, until)
            fresh = yield from self._opened()
            with self.mutex:
                borrower.session = fresh
                fresh.user = borrower
                fresh.home = borrower.home
                self.sessions.append(fresh)
            return fresh
        finally:
            self.leave(borrower)

    def lend_at_once(self, borrower: Borrower, numbers: Sequence[int], name: str) -> LockSession | None:
        """Give `borrower` a session that nobody uses now and that holds none of `numbers`; None: `lend` must."""
        if self._pid != forks.pid:
            return None
        with self.mutex:
            return self._pick(borrower, numbers, name, empty=False)

    def take_at_once(self, borrower: Borrower, session: LockSession) -> bool:
        """Begin the turn of `borrower` on `session`, if nobody uses it; False: `take` must."""
        with self.mutex:
            if session.user is not None or session.dead:
                return False
            if session in self._kept_for and self._is_kept_from(borrower, session):
                return False
            borrower.session = session
            session.user = borrower
        return True

    def take(self, borrower: Borrower, session: LockSession) -> Steps[None]:
        """Wait for the turn of `borrower` on `session`.

        Raises: ServerGoneError: it was cut, or the turn did not come.
        """
        since = time.monotonic()
        until = since + STALL
        try:
            while not session.dead:
                self._queue[borrower] = (session, (), "", since)  # first, or the end of the other's turn may be missed
                if self.take_at_once(borrower, session):
                    return
                yield from self._turn(borrower, until)
        finally:
            self.leave(borrower)
        raise ServerGoneError("the session was cut")

    def leave(self, borrower: Borrower) -> None:
        """Wait for nothing any more. Twice is the same as once, since an interrupt may come between the two lines."""
        self._opening.discard(borrower)
        self._queue.pop(borrower, None)

    @staticmethod
    def _turn(borrower: Borrower, until: float) -> Steps[None]:
        now = time.monotonic()
        if now >= until:
            raise ServerGoneError(f"no session of the lock store became free in {STALL:.0f} s")
        yield GateWait(borrower.gate, min(until, now + LOOK_AGAIN))

    def free(self, borrower: Borrower) -> Steps[None]:
        """End the turn of `borrower`, and pay what a lock that was forgotten meanwhile has left.

        Raises: ServerGoneError, ServerRefusedError: the session is of no more use.
        """
        while not self.free_at_once(borrower):
            yield from borrower.session.settle()

    def free_at_once(self, borrower: Borrower) -> bool:
        """End the turn of `borrower`; False: there is something to pay, so `free` must."""
        session: LockSession = borrower.session
        with self.mutex:
            if session.debts and not session.dead:
                return False
            session.blocked = False
            session.used_at = time.monotonic()
            session.user = borrower.session = None
            if self._queue:
                self._call_next(session)
            if len(self.sessions) > self._kept or session.used_at >= self._prune_at:
                self.prune()
        if session.dead:
            self.forget(session)
        return True

    def _call_next(self, session: LockSession) -> None:
        now = session.used_at
        expected = [waiting for waiting, until in self._kept_for.values() if now < until]
        for waiting, (wanted, numbers, name, since) in tuple(self._queue.items()):
            if waiting.home is not None and not waiting.home.is_running():
                if waiting.home.is_closed():  # its task never goes on
                    self._queue.pop(waiting, None)
                continue
            if waiting in expected:
                continue
            if wanted is session or (wanted is None and _serves(session, waiting, numbers, name)):
                if now - max(since, self._kept_at) > PATIENCE:
                    self._kept_at = now
                    self._kept_for[session] = (waiting, now + KEPT)
                waiting.gate.open()
                return

    def _is_kept_from(self, borrower: Borrower, session: LockSession) -> bool:
        """Say whether `session`, which is kept, is kept for another one, who waits still."""
        kept = self._kept_for.get(session)
        if kept is None:  # a signal has come in between
            return False
        waiting, until = kept
        if waiting is not borrower and waiting in self._queue and time.monotonic() < until:
            return True
        self._kept_for.pop(session, None)
        return False

    def forget(self, session: LockSession) -> None:
        """Close a session that is of no more use, and tell the owners of what it held."""
        with self.mutex:
            held, session.held = session.held, {}
            session.dead = True
            self._kept_for.pop(session, None)
            if session in self.sessions:
                self.sessions.remove(session)
            if session.user is None:
                session.discard()
        _lose(iter(held.values()))

    def prune(self) -> None:
        """End the sessions that hold nothing, and are too many, or idle for too long.

        One more is kept where all others are full, or each further lock would open and end a session.
        """
        now = time.monotonic()
        oldest = now - self._max_idle
        with self.mutex:
            self._prune_at = now + self._max_idle / PRUNES
            for session in list(self.sessions):
                if session.user is not None or session.held:
                    continue
                too_many = len(self.sessions) > self._kept and (not self._kept or self._has_room(session))
                if too_many or session.used_at < oldest:
                    self.forget(session)

    def _has_room(self, but: LockSession) -> bool:
        return any(not one.held or len(one.held) < one.capacity for one in self.sessions if one is not but)

    def close(self) -> None:
        """End every session that holds nothing."""
        if self._pid != forks.pid:
            self._reset()  # a forked child has none: their sockets' numbers may be other files' by now
        with self.mutex:
            for session in list(self.sessions):
                if session.user is None and not session.held:
                    self.forget(session)

    def _pick(self, borrower: Borrower, numbers: Sequence[int], name: str, *, empty: bool) -> LockSession | None:
        for session in self.sessions:
            if session.held and (session.name != name or empty or not _serves(session, borrower, numbers, name)):
                continue
            if session.user is not None or session.dead:
                continue
            if session in self._kept_for and self._is_kept_from(borrower, session):
                continue
            borrower.session = session
            session.user = borrower
            session.home = borrower.home
            return session
        return None

    def _may_open(self, borrower: Borrower, numbers: Sequence[int], name: str) -> bool:
        if len(self.sessions) + len(self._opening) < self._size:
            return True
        soon = any(one.home is borrower.home and one.work == borrower.work for one in self._opening)
        return not soon and not any(not one.blocked and _serves(one, borrower, numbers, name) for one in self.sessions)


def _lose(holds: Iterator[Hold]) -> None:
    """Tell the owners; another thread goes on where this one is interrupted, or a callback ends it."""
    for hold in holds:
        try:
            hold.lose()
        except BaseException:
            # The same one again, on which several may stand: who was told is not told twice.
            with contextlib.suppress(RuntimeError):  # there is room for no more threads: they hear at their release
                threads.start(partial(_lose, itertools.chain((hold,), holds)), "concurrency_safe loss")
            raise


def _serves(session: LockSession, borrower: Borrower, numbers: Sequence[int], name: str) -> bool:
    """Say whether `session`, when nobody uses it, will do."""
    held = session.held
    if session.dead or not held:
        return not session.dead
    return (
        session.home is borrower.home
        and session.name == name
        and len(held) + len(numbers) <= session.capacity
        and not any(number in held for number in numbers)
    )
