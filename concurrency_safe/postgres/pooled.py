"""Locks behind a pooler in transaction mode: each is an open transaction, on a connection of its own.

Such a pooler lends its server process to somebody else as soon as a transaction ends, so only what a transaction holds
stays ours. It is READ COMMITTED and writes nothing: it has no snapshot and no transaction id, so VACUUM goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from psycopg import pq
from psycopg.pq.abc import PGresult

from concurrency_safe.core.errors import ConfigurationError, LockUnavailable
from concurrency_safe.core.sessions import Request
from concurrency_safe.core.steps import Steps

from . import protocol, sql
from .session import Grant, LockSession, connect, refuse_impostor, refuse_standby, token_of


class PooledSession(LockSession):
    """A connection to the pooler; see `LockSession`, whose verbs these are."""

    __slots__ = ()

    #: Its one transaction belongs to one acquisition.
    capacity = 0

    def try_acquire(
        self, request: Request, numbers: Sequence[int], name: str, kind: sql.Kind, *, fenced: bool
    ) -> Steps[Grant | None]:
        """See `LockSession.try_acquire`."""
        if kind == "slot":
            raise ConfigurationError(
                f"lock {request.text!r}: slots={request.slots} behind a pooler in transaction mode: a slot needs a "
                "session; give the library a direct connection (CONCURRENCY_SAFE = {'DSN': 'postgresql://...'})"
            )
        self.name = name
        self.debts.update((number, request.shared) for number in numbers)
        text = sql.try_pooled(numbers, shared=request.shared, fenced=fenced)
        result = yield from protocol.query(self.pgconn, sql.begin(name, self.pgconn.server_version, 0) + text)
        if result.get_value(0, 0) == b"t":
            return Grant(tuple(numbers), token_of(result, 1) if fenced else None)
        yield from protocol.query(self.pgconn, b"ROLLBACK")
        self.debts.clear()
        return None

    def wait_acquire(
        self, request: Request, numbers: Sequence[int], name: str, max_block: float, *, fenced: bool
    ) -> Steps[Grant | None]:
        """See `LockSession.wait_acquire`."""
        self.debts.update((number, request.shared) for number in numbers)
        deadline = request.deadline
        while (left := max_block if deadline is None else min(deadline - time.monotonic(), max_block)) > 0:
            until = time.monotonic() + left
            result: PGresult | None = None
            try:
                begin = sql.begin(name, self.pgconn.server_version, max(1, round(left * 1000)))
                for number in numbers:
                    text = sql.wait_pooled(number, shared=request.shared, fenced=fenced and number == numbers[-1])
                    result = yield from protocol.query(self.pgconn, begin + text, until + protocol.GRACE)
                    piece = max(1, round((until - time.monotonic()) * 1000))
                    begin = b"SET LOCAL lock_timeout = %d; " % piece
            except protocol.ServerRefusedError as refused:
                if refused.sqlstate != sql.LOCK_NOT_AVAILABLE:
                    raise
                yield from protocol.query(self.pgconn, b"ROLLBACK")
            else:
                return Grant(tuple(numbers), token_of(result, 0) if fenced and result is not None else None)
        self.debts.clear()
        return None

    def release(self, numbers: Sequence[int], *, shared: bool) -> Steps[bool]:  # noqa: ARG002 - the transaction's
        """End the transaction; False: it was ended already."""
        held = self.pgconn.transaction_status == pq.TransactionStatus.INTRANS
        result = yield from protocol.query(self.pgconn, b"COMMIT")
        return held and result.command_status == b"COMMIT"

    def holders(self, statement: sql.Statement, numbers: Sequence[int]) -> Steps[PGresult]:
        """See `LockSession.holders`."""
        return protocol.query(self.pgconn, sql.inline(statement, numbers))


def open_pooled_session(info: str) -> Steps[PooledSession]:
    """Connect, and prove that there is a PostgreSQL that can be written to behind the pooler.

    Raises: LockUnavailable, ConfigurationError.
    """
    pgconn = yield from connect(info)
    try:
        row = yield from protocol.query(pgconn, b"SELECT pg_is_in_recovery(), version()")
        refuse_impostor((row.get_value(0, 1) or b"").decode(errors="replace"), pgconn.server_version)
        refuse_standby(in_recovery=row.get_value(0, 0) == b"t")
    except (protocol.ServerGoneError, protocol.ServerRefusedError) as error:
        pgconn.finish()
        raise LockUnavailable(f"the lock store refused a new session: {str(error).strip()}") from error
    except BaseException:
        pgconn.finish()
        raise
    return PooledSession(pgconn, pgconn.backend_pid)
