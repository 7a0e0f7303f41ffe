"""Session scope: locks held by private sessions, out of the pool of this process, until they are released."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from concurrency_safe.core.errors import (
    ConcurrencySafeError,
    ConfigurationError,
    LockAcquireTimeout,
    LockCapacityError,
    LockDeadlock,
    LockUnavailable,
)
from concurrency_safe.core.keys import slot_numbers
from concurrency_safe.core.sessions import Borrower, Hold, Request, StoreOptions
from concurrency_safe.core.steps import CallWait, Steps

from . import protocol, sql
from .inspect import holders_of, session_name
from .pool import SessionPool
from .pooled import open_pooled_session
from .protocol import ServerGoneError, ServerRefusedError
from .session import Grant, LockSession, complete_conninfo, open_session
from .watch import watch

#: Seconds between two looks for a free slot, by the one waiter at the head of the queue: the first, and the most.
FIRST_LOOK, LAST_LOOK = 0.01, 0.1

#: How often one try for a slot looks again, when a slot is free and somebody else is at the gate.
TRIES = 5


#: A key whose try was refused is waited for without a try the next so many times, by who has that many seconds; and how
#: many such keys are remembered.
BUSY_TURNS, BUSY_LEAST, BUSY_KEYS = 16, 0.05, 1000


class PostgresBackend:
    """Locks of one database, for one process."""

    def __init__(self, dsn: str, options: StoreOptions, now: Callable[[], str] | None = None) -> None:
        """Take the DSN of the store; nothing connects yet. `now` gives the one for a new session; None: it stays."""
        self._conninfo = complete_conninfo(dsn)
        self._now = now
        self._options = options
        self._pace = protocol.Pace()
        self.pool = SessionPool(self._open, options.pool_size, options.pool_idle)
        #: Keys that were busy lately, by number, and for how many more turns they count as busy.
        self._busy: dict[int, int] = {}

    def _open(self) -> Steps[LockSession]:
        if self._now is not None:
            dsns: list[str] = []
            now = self._now
            yield CallWait(lambda: dsns.append(now()))
            self._conninfo = complete_conninfo(dsns[0])
        opened = open_pooled_session if self._options.pooled else open_session
        session: LockSession = yield from opened(self._conninfo)
        session.wire.pace = self._pace
        watch(session, self.pool)
        return session

    def acquire(self, borrower: Borrower, request: Request, holds: Sequence[Hold]) -> Steps[Grant | None]:
        """Take all keys of `request` or none; see `core.sessions.Backend`.

        After anything but a return the caller lets `undo` run.

        Raises: LockUnavailable, LockDeadlock, LockCapacityError, LockAcquireTimeout (too many waiters),
            ConfigurationError.
        """
        numbers = _numbers(request)
        try:
            grant = yield from self._try(borrower, request, numbers)
            if grant is None and request.timeout != 0:
                grant = yield from self._wait(borrower, request, numbers)
            elif grant is None and request.slots > 1:
                grant = yield from self._try_slots_again(borrower, request, numbers)
            if grant is not None:
                self._confirm(borrower, holds, grant, numbers)
                if not self.pool.free_at_once(borrower):
                    yield from self.pool.free(borrower)
        except (ServerGoneError, ServerRefusedError) as error:
            raise explain(error, request, time.monotonic() - holds[0].since) from error
        return grant

    def _try(self, borrower: Borrower, request: Request, numbers: Sequence[int]) -> Steps[Grant | None]:
        name = session_name(borrower.work)
        kind: sql.Kind = "slot" if request.slots > 1 else "all" if len(numbers) > 1 else "one"
        while True:
            session = self.pool.lend_at_once(borrower, numbers, name) or (
                yield from self.pool.lend(borrower, numbers, name, empty=False)
            )
            if self._busy and self._is_busy(session, request, numbers):
                return None
            used = bool(session.wire.prepared)
            try:
                grant = yield from session.try_acquire(request, numbers, name, kind, fenced=self._options.fencing)
            except ServerGoneError:
                # It died while it was idle (a restart, a firewall): nothing can have been granted. A new one must do.
                if not used:
                    raise
                yield from self._end(borrower)
                continue
            if grant is None and kind == "one":
                self._note_busy(numbers[0])
            return grant

    def _is_busy(self, session: LockSession, request: Request, numbers: Sequence[int]) -> bool:
        """Say whether a try would be in vain, most likely: then it is one statement less, and one more in the queue."""
        turns = self._busy.pop(numbers[0], 0)
        if turns > 1:
            self._busy[numbers[0]] = turns - 1
        is_simple = len(numbers) == 1 and not request.shared and request.max_waiters is None
        if not turns or not is_simple or request.timeout == 0:
            return False
        has_time = request.deadline is None or request.deadline - time.monotonic() > BUSY_LEAST
        return has_time and not session.held and not session.is_dead()

    def _note_busy(self, number: int) -> None:
        self._busy[number] = BUSY_TURNS
        if len(self._busy) > BUSY_KEYS:
            # A tuple at one stroke: another thread may add to it.
            self._busy.pop(tuple(self._busy)[0], None)  # noqa: RUF015 - see above

    def _try_slots_again(self, borrower: Borrower, request: Request, numbers: Sequence[int]) -> Steps[Grant | None]:
        """Try a few times more while a slot is free: who tries holds the gate for an instant, in others' way."""
        session: LockSession = borrower.session
        name = session_name(borrower.work)
        for _ in range(TRIES):
            holders = holders_of((yield from session.holders(sql.HOLDERS, numbers[1:])))
            if len(holders) >= request.slots:
                break
            yield from protocol.pause(borrower.gate, time.monotonic() + FIRST_LOOK)
            grant = yield from session.try_acquire(request, numbers, name, "slot", fenced=self._options.fencing)
            if grant is not None:
                return grant
        return None

    def _wait(self, borrower: Borrower, request: Request, numbers: Sequence[int]) -> Steps[Grant | None]:
        """Block on a session that holds nothing; it keeps the lock then."""
        session: LockSession = borrower.session
        name = session_name(borrower.work)
        if request.max_waiters is not None:
            yield from self._refuse_long_queue(borrower, request, numbers)
        if session.held:
            yield from self.pool.free(borrower)
            session = yield from self.pool.lend(borrower, numbers, name, empty=True)
        session.blocked = True
        if request.slots > 1:
            return (yield from self._wait_for_slot(borrower, session, request, numbers))
        return (
            yield from session.wait_acquire(
                request, numbers, name, self._options.max_block, fenced=self._options.fencing
            )
        )

    def _wait_for_slot(
        self, borrower: Borrower, session: LockSession, request: Request, numbers: Sequence[int]
    ) -> Steps[Grant | None]:
        """Queue at the gate, first come first served; its holder alone looks for a free slot, again and again."""
        name = session_name(borrower.work)
        gate = yield from session.wait_acquire(request, numbers[:1], name, self._options.max_block, fenced=False)
        if gate is None:
            return None
        look = FIRST_LOOK
        while True:
            grant = yield from session.try_acquire(request, numbers, name, "head", fenced=self._options.fencing)
            now = time.monotonic()
            if grant is not None or (request.deadline is not None and now >= request.deadline):
                if grant is None:
                    yield from session.release(numbers[:1], shared=False)
                    session.debts.difference_update((number, False) for number in numbers)
                return grant
            until = now + look if request.deadline is None else min(now + look, request.deadline)
            yield from protocol.pause(borrower.gate, until)
            look = min(look * 2, LAST_LOOK)

    def _refuse_long_queue(self, borrower: Borrower, request: Request, numbers: Sequence[int]) -> Steps[None]:
        session: LockSession = borrower.session
        waiting = holders_of((yield from session.holders(sql.WAITERS, numbers[:1] if request.slots > 1 else numbers)))
        if len(waiting) >= (request.max_waiters or 0):
            refuse_long_queue(request, len(waiting), (yield from self.conflict(borrower, request)))

    @staticmethod
    def _confirm(borrower: Borrower, holds: Sequence[Hold], grant: Grant, asked: Sequence[int]) -> None:
        session: LockSession = borrower.session
        shared = holds[0].shared
        for hold, number in zip(holds, grant.numbers, strict=True):
            hold.number = number
            hold.session = session
            session.held[number] = hold
        for number in asked:  # not all debts: a lock on this session may have been left to us meanwhile
            session.debts.discard((number, shared))

    def release(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:
        """Release `holds`; False: one of them wasn't held any more, since its session was cut, or a pooler shares it.

        After anything but a return the caller lets `undo` run.
        """
        released = True
        for session, mine in ({holds[0].session: holds} if len(holds) == 1 else _by_session(holds)).items():
            try:
                if not self.pool.take_at_once(borrower, session):
                    yield from self.pool.take(borrower, session)
                ours = yield from self._release_in(session, mine)
            except (ServerGoneError, ServerRefusedError):
                ours = False
                if borrower.session is None and not session.dead:  # its turn did not come
                    yield from self.undo(borrower, mine)
                    continue
            if not ours:
                released = False
                yield from self._end(borrower)
            elif (channels := session.asked()) or not self.pool.free_at_once(borrower):
                yield from self._leave(borrower, channels)
        return released

    @staticmethod
    def _release_in(session: LockSession, holds: Sequence[Hold]) -> Steps[bool]:
        numbers = []
        held, debts = session.held, session.debts
        for hold in holds:
            number = hold.number
            if held.get(number) is hold:  # else another thread has just released it
                debts.add((number, hold.shared))
                del held[number]
                session.last = number, hold.key
                numbers.append(number)
        if not numbers:
            return True
        shared = holds[0].shared
        ours = yield from session.release(numbers, shared=shared)
        for number in numbers:
            debts.discard((number, shared))
        return ours

    def _leave(self, borrower: Borrower, channels: Sequence[bytes]) -> Steps[None]:
        """Answer who asked, and end the turn of `borrower`.

        A session that fails now costs it nothing, for it holds nothing there.
        """
        session: LockSession = borrower.session
        try:
            for channel in channels:
                yield from session.tell(channel)
            yield from self.pool.free(borrower)
        except (ServerGoneError, ServerRefusedError):
            yield from self._end(borrower)

    def undo(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[None]:
        """End what an interrupted acquisition or release left: afterwards nothing of `holds` is held.

        A session that holds nothing else is closed; one that does is cleaned, or closed when that fails.
        """
        self.pool.leave(borrower)
        session: LockSession | None = borrower.session
        if session is not None and session.user is borrower:
            yield from self._clean(borrower)
        for hold in holds:
            session, hold.session = hold.session, None
            if session is None:
                continue
            with self.pool.mutex:
                if session.held.get(hold.number) is not hold:
                    continue
                session.debts.add((hold.number, hold.shared))
                del session.held[hold.number]
                if session.user is not None:
                    continue  # who pays it at the end of its turn
                borrower.session = session
                session.user = borrower
            yield from self._clean(borrower)

    def _clean(self, borrower: Borrower) -> Steps[None]:
        session: LockSession = borrower.session
        try:
            if session.held:
                yield from session.settle()
                yield from self.pool.free(borrower)
                return
        except (ServerGoneError, ServerRefusedError):
            pass
        except BaseException:  # once more: no time is left to be polite
            session.dead = True
            borrower.session = session.user = None
            self.pool.forget(session)
            raise
        session.dead = True
        yield from self._end(borrower)

    def _end(self, borrower: Borrower) -> Steps[None]:
        """Close the session that `borrower` uses, whatever it does now; others that it held locks for lose them."""
        session: LockSession | None = borrower.session
        if session is None:
            return
        try:
            yield from session.end()
        finally:
            borrower.session = session.user = None
            self.pool.forget(session)

    def conflict(self, borrower: Borrower, request: Request) -> Steps[str | None]:
        """After a refusal: say who holds the keys, and end the turn of `borrower`."""
        session: LockSession = borrower.session
        holders = yield from self.holders(session, request)
        yield from self._leave(borrower, session.asked())
        return holders

    @staticmethod
    def holders(session: LockSession, request: Request) -> Steps[str | None]:
        """Say who holds the keys; None when that can't be read or nobody does any more."""
        numbers = _numbers(request)
        try:
            rows = yield from session.holders(sql.HOLDERS, numbers[1:] if request.slots > 1 else numbers)
        except (ServerGoneError, ServerRefusedError):
            return None
        return ", ".join(map(str, holders_of(rows))) or None

    def prove(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:
        """Make sure that all of `holds` are held at this moment, since their sessions answer; False: one was cut.

        Raises: LockUnavailable: no turn came; at once, where a task uses the session and a thread asks, which may be
            that of its event loop.
        """
        for session, mine in _by_session(holds).items():
            try:
                if not self.pool.take_at_once(borrower, session):
                    if borrower.home is None is not session.home:
                        raise ServerGoneError("its session is in use")
                    yield from self.pool.take(borrower, session)
                yield from session.beat()
                yield from self.pool.free(borrower)
            except (ServerGoneError, ServerRefusedError) as error:
                if borrower.session is None and not session.dead:  # its turn did not come
                    raise LockUnavailable(
                        f"lock {mine[0].key.text!r} can't be proved to be held: {error}", mine[0].key.text
                    ) from error
                yield from self._end(borrower)
                return False
        return True

    def is_lost(self, hold: Hold) -> bool:
        """Say, without a query, whether the session of `hold` was cut."""
        session: LockSession = hold.session
        with self.pool.mutex:
            lost = session.dead or (session.user is None and session.is_dead())
        if lost:
            self.pool.forget(session)
        return lost

    def close(self) -> None:
        """End the idle sessions; those that hold locks end when they release."""
        self.pool.close()


def refuse_long_queue(request: Request, waiting: int, holder: str | None) -> None:
    """Refuse to wait where `max_waiters` wait already.

    Raises: LockAcquireTimeout.
    """
    if request.max_waiters is not None and waiting >= request.max_waiters:
        raise LockAcquireTimeout(
            f"lock {request.text!r} is held by {holder or 'somebody else'}, and {waiting} wait for it already "
            f"(max_waiters={request.max_waiters}); not waited for",
            request.text,
            request.timeout,
            0.0,
            holder,
        )


def _numbers(request: Request) -> tuple[int, ...]:
    """Give what is locked for `request`; for slots: the gate, then the slots in an order of chance."""
    keys = request.keys
    if request.slots == 1:
        return (keys[0].number,) if len(keys) == 1 else tuple([key.number for key in keys])
    gate, *slots = slot_numbers(keys[0], request.slots)
    random.shuffle(slots)
    return (gate, *slots)


def _by_session(holds: Sequence[Hold]) -> dict[LockSession, list[Hold]]:
    sessions: dict[LockSession, list[Hold]] = {}
    for hold in holds:
        sessions.setdefault(hold.session, []).append(hold)
    return sessions


def explain(error: ServerGoneError | ServerRefusedError, request: Request, waited: float) -> ConcurrencySafeError:
    """Give the library's error for what the server said while `request` was under way."""
    sqlstate = getattr(error, "sqlstate", None)
    reason = str(error).strip()
    text = request.text
    if sqlstate == sql.DEADLOCK_DETECTED:
        message = (
            f"lock {text!r} was not acquired: PostgreSQL found a deadlock and chose this waiter as the victim "
            f"after {waited:.1f} s; acquire keys in one order everywhere, or several at once"
        )
        return LockDeadlock(message, text, request.timeout, waited)
    if sqlstate == sql.OUT_OF_MEMORY:
        return LockCapacityError(
            f"lock {text!r} was not acquired: PostgreSQL's lock table is full ({reason}); "
            "hold fewer locks at a time, or raise max_locks_per_transaction",
            text,
        )
    if sqlstate == sql.UNDEFINED_TABLE and sql.FENCE in reason:
        return ConfigurationError(
            f"lock {text!r}: FENCING needs the sequence {sql.FENCE}, which this database hasn't; run "
            "`python manage.py migrate concurrency_safe`, or `concurrency-safe init` in a project without Django",
            text,
        )
    return LockUnavailable(f"lock {text!r} was not acquired: {reason}", text)
