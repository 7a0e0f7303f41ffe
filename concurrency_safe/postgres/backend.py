"""Session scope: a lock held by a private session, from the pool of this process, until it is released."""

from __future__ import annotations

import time

from concurrency_safe.core.errors import (
    ConcurrencySafeError,
    LockCapacityError,
    LockDeadlock,
    LockUnavailable,
)
from concurrency_safe.core.keys import LockKey
from concurrency_safe.core.sessions import Slot
from concurrency_safe.core.steps import Steps

from . import sql
from .inspect import Holder, holders_of, session_name
from .pool import SessionPool
from .protocol import ServerGoneError, ServerRefusedError
from .session import LockSession, complete_conninfo, open_session


class PostgresBackend:
    """Locks of one database, for one process."""

    def __init__(self, dsn: str, *, pool_size: int, pool_idle: float, max_block: float) -> None:
        """Take the DSN and the settings of those names (seconds); nothing connects yet."""
        self._conninfo = complete_conninfo(dsn)
        self._pool = SessionPool(pool_size, pool_idle)
        self._max_block = max_block

    def acquire(self, slot: Slot, key: LockKey, deadline: float | None, timeout: float | None) -> Steps[bool]:
        """Take the lock on `key`, by the monotonic time `deadline` (None: for ever).

        `timeout`: what the caller asked for, for messages; 0 means that one try is all.

        Returns: True when `slot.session` holds it; False when others kept it: `slot.session` holds nothing then.
        Raises: LockUnavailable, LockDeadlock, LockCapacityError, ConfigurationError: the caller ends `slot.session`.
        """
        number = b"%d" % key.number
        started = time.monotonic()
        try:
            if (yield from self._try_acquire(slot, number)):
                return True
            if timeout == 0:
                return False
            session: LockSession = slot.session
            return (yield from session.wait_acquire(number, deadline, self._max_block))
        except (ServerGoneError, ServerRefusedError) as error:
            raise explain(error, key, timeout, time.monotonic() - started) from error

    def _try_acquire(self, slot: Slot, number: bytes) -> Steps[bool]:
        name = session_name(slot.work)
        idle = slot.session = self._pool.checkout()
        if idle is not None:
            try:
                return (yield from idle.try_acquire(number, name))
            except ServerGoneError:
                # It died while it was idle (a restart, a firewall). Nothing can have been granted to it.
                idle.discard()
        fresh = slot.session = yield from open_session(self._conninfo)
        return (yield from fresh.try_acquire(number, name))

    def release(self, slot: Slot, key: LockKey) -> Steps[bool]:
        """Release the lock that `slot.session` holds, and return the session to the pool.

        Returns: False when it wasn't held any more: the session was cut, or shared by a pooler.
        """
        session: LockSession = slot.session
        try:
            released = yield from session.release(b"%d" % key.number)
        except (ServerGoneError, ServerRefusedError):
            released = False
        # Out of the slot first: from the pool it may be lent to another thread at once.
        slot.session = None
        if released:
            self._pool.checkin(session)
        else:
            session.discard()
        return released

    def give_back(self, slot: Slot) -> None:
        """Return a session that holds nothing, after a conflict, to the pool."""
        session, slot.session = slot.session, None
        self._pool.checkin(session)

    def holders(self, slot: Slot, key: LockKey) -> Steps[list[Holder]]:
        """Read who holds `key`; an empty list when that can't be read or nobody does any more."""
        session: LockSession = slot.session
        try:
            return holders_of((yield from session.holders(b"%d" % key.number)))
        except (ServerGoneError, ServerRefusedError):
            return []

    def close(self) -> None:
        """End the idle sessions; those that hold locks end when they release."""
        self._pool.close()


def explain(
    error: ServerGoneError | ServerRefusedError, key: LockKey, timeout: float | None, waited: float
) -> ConcurrencySafeError:
    """Give the library's error for what the server said while `key` was acquired."""
    sqlstate = getattr(error, "sqlstate", None)
    reason = str(error).strip()
    if sqlstate == sql.DEADLOCK_DETECTED:
        message = (
            f"lock {key.text!r} was not acquired: PostgreSQL found a deadlock and chose this waiter as the victim "
            f"after {waited:.1f} s; acquire keys in one order everywhere, or several at once"
        )
        return LockDeadlock(message, key.text, timeout, waited)
    if sqlstate == sql.OUT_OF_MEMORY:
        return LockCapacityError(
            f"lock {key.text!r} was not acquired: PostgreSQL's lock table is full ({reason}); "
            "hold fewer locks at a time, or raise max_locks_per_transaction",
            key.text,
        )
    return LockUnavailable(f"lock {key.text!r} was not acquired: {reason}", key.text)
