"""Look who holds a key, and who waits for it, without taking it."""

from __future__ import annotations

from concurrency_safe.core.errors import LockUnavailable
from concurrency_safe.core.keys import LockKey, slot_numbers
from concurrency_safe.core.options import MOST_SLOTS
from concurrency_safe.core.sessions import Borrower
from concurrency_safe.core.steps import Steps

from . import sql
from .inspect import Holder, holders_of, session_name
from .pool import SessionPool
from .protocol import ServerGoneError, ServerRefusedError


def look(pool: SessionPool, borrower: Borrower, key: LockKey) -> Steps[tuple[list[Holder], list[Holder]]]:
    """Give the holders of `key`, in any mode, and those who wait for it; each by the number of its server process.

    Raises: LockUnavailable, ConfigurationError.
    """
    gate, *slots = slot_numbers(key, MOST_SLOTS)
    try:
        session = yield from pool.lend(borrower, (), session_name(None), empty=False)
        holders = holders_of((yield from session.holders(sql.HOLDERS, [key.number, *slots])))
        # The first of those who wait for a slot holds the gate, and looks for a free slot.
        at_gate = holders_of((yield from session.holders(sql.HOLDERS, [gate])))
        waiting = holders_of((yield from session.holders(sql.WAITERS, [key.number, gate])))
        yield from pool.free(borrower)
    except (ServerGoneError, ServerRefusedError) as error:
        raise LockUnavailable(f"who holds lock {key.text!r} can't be read: {str(error).strip()}", key.text) from error
    holding = {holder.pid for holder in holders}
    return holders, [*(one for one in at_gate if one.pid not in holding), *waiting]
