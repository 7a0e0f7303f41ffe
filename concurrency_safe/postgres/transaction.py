"""Transaction scope: a lock held by Django's own connection until its outermost commit or rollback.

The server releases it with the transaction, so nobody can read what the transaction is about to write. The price is
that a wait happens on the user's connection: it must leave the transaction usable and its settings as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from psycopg import Connection, pq
from psycopg import Error as PsycopgError

from concurrency_safe.core.errors import LockUnavailable

from . import protocol, sql
from .alias import transaction_of
from .backend import explain, refuse_long_queue
from .inspect import Holder
from .session import CANCEL_TIMEOUT, cancel_steps
from .waiting import drive, has_hung_up

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from psycopg.pq.abc import PGconn

    from concurrency_safe.core.keys import LockKey
    from concurrency_safe.core.sessions import Request, StoreOptions

_SAVEPOINT = "concurrency_safe_wait"

#: Seconds a piece, for drivers that block in C: a signal is seen only between two pieces. They lose their place in
#: the queue each time.
BLOCKING_PIECE = 0.2

#: The pace of the answers on an alias.
_paces: dict[str, protocol.Pace] = {}


class TransactionLock:
    """One key on one Django connection, which is inside a transaction: its acquisition, and how long it lasts."""

    def __init__(self, connection: BaseDatabaseWrapper, request: Request, options: StoreOptions) -> None:
        """Prepare to take what `request` says; nothing is asked yet."""
        connection.ensure_connection()
        self._connection = connection
        self._request = request
        self._options = options
        self._driver = connection.connection
        self._transaction = transaction_of(connection)
        self._hooks = connection.run_on_commit
        #: The fencing token; None: not enabled.
        self.token: int | None = None

    def is_over(self) -> bool:
        """Say whether what held the lock has ended: its transaction, or the savepoint in which it was taken.

        Django tells of neither, and `@atomic` uses one block for all calls. But it makes a new list of commit hooks at
        every commit and rollback, to a savepoint, too; only then, and without autocommit, the server is asked.
        """
        connection = self._connection
        if transaction_of(connection) is not self._transaction:
            return True
        is_known = connection.run_on_commit is self._hooks and self._transaction is not connection
        if is_known or connection.connection is not self._driver:
            return False
        if self._driver.info.transaction_status == pq.TransactionStatus.IDLE or not self._is_held():
            return True
        self._hooks = connection.run_on_commit
        return False

    def ended_before(self, other: TransactionLock) -> bool:
        """Say whether `other` was taken later on the same connection, and this one may have ended before; no query."""
        return self._connection is other._connection and (
            self._transaction is not other._transaction or self._hooks is not other._hooks
        )

    def lives_with(self, other: TransactionLock) -> bool:
        """Say whether this one is held for certain while `other` is, which was taken later; no query."""
        return self._connection is other._connection and not self.ended_before(other) and not self.is_cut()

    def run(self, statement: str) -> None:
        """Run a statement in the transaction, so that it counts with the commit, and not without it.

        Raises: LockUnavailable: it failed; the transaction is as it was.
        """
        from django.db import Error

        self._execute(f"SAVEPOINT {_SAVEPOINT}")
        try:
            self._execute(statement)
        except BaseException as error:
            self._recover()
            if isinstance(error, Error):
                raise LockUnavailable(str(error).strip(), self._request.text) from error
            raise
        self._execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")

    def _is_held(self) -> bool:
        from django.db import Error

        numbers = [key.number for key in self._request.keys]
        try:
            return bool(self._row(sql.HELD_IN_TRANSACTION, {"numbers": numbers})[0] == len(numbers))
        except Error:
            return True  # a broken transaction; nothing can be written until its rollback

    def is_cut(self) -> bool:
        """Say whether the connection was closed or replaced, by either end, before the transaction ended."""
        driver = self._driver
        return self._connection.connection is not driver or bool(driver.closed) or has_hung_up(driver.fileno())

    def acquire(self) -> bool:
        """Take all keys or none: one statement for one key that is free; a savepoint around anything else.

        Returns: False when others kept one past the deadline; the transaction is as it was then.
        Raises: LockUnavailable (also in a transaction that has failed already), LockDeadlock, LockCapacityError,
            ConfigurationError (no sequence for FENCING).
        """
        from django.db import Error

        request = self._request
        started = time.monotonic()
        try:
            acquired = len(request.keys) == 1 and self._try(request.keys[0])
            if not acquired and request.timeout != 0:
                self._refuse_long_queue()
            if not acquired and (request.timeout != 0 or len(request.keys) > 1):
                acquired = self._wait()
            if acquired and self._options.fencing:
                self.token = int(self._row(sql.TOKEN_IN_TRANSACTION)[0])
        except (protocol.ServerGoneError, protocol.ServerRefusedError) as error:
            raise explain(error, request, time.monotonic() - started) from error
        except Error as error:
            refused = protocol.ServerRefusedError(_sqlstate(error), str(error))
            raise explain(refused, request, time.monotonic() - started) from error
        return acquired

    def holders(self) -> list[Holder]:
        """Read who holds the keys now."""
        with self._connection.cursor() as cursor:
            numbers = [key.number for key in self._request.keys]
            cursor.execute(sql.HOLDERS_IN_TRANSACTION, {"numbers": numbers})
            return [Holder(*row) for row in cursor.fetchall()]

    def _refuse_long_queue(self) -> None:
        request = self._request
        if request.max_waiters is None:
            return
        with self._connection.cursor() as cursor:
            cursor.execute(sql.WAITERS_IN_TRANSACTION, {"numbers": [key.number for key in request.keys]})
            refuse_long_queue(request, len(cursor.fetchall()), ", ".join(map(str, self.holders())) or None)

    def _try(self, key: LockKey) -> bool:
        statement = sql.try_in_transaction(shared=self._request.shared)
        connection, raw = self._connection, self._raw()
        # Django's cursor begins the transaction, and shows its statements to whoever listens.
        if raw is None or not _is_begun(raw) or connection.queries_logged or connection.execute_wrappers:
            return bool(self._row(statement, [key.number])[0])
        pace = _paces.setdefault(connection.alias, protocol.Pace())
        try:
            result = drive(protocol.query(raw.pgconn, (statement % key.number).encode(), pace=pace))
        except (protocol.ServerGoneError, protocol.ServerRefusedError):
            connection.errors_occurred = True  # as of a cursor's: Django looks after the connection
            raise
        except BaseException:
            try:
                self._end_statement()
            except protocol.ServerGoneError:
                connection.close()
            raise
        return result.get_value(0, 0) == b"t"

    def _end_statement(self) -> None:
        """After an interrupt: leave no statement under way. Raises: ServerGoneError: that can't be done."""
        raw = self._raw()
        if raw is not None and raw.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            end_statement(raw.pgconn)

    def _wait(self) -> bool:
        """Wait inside a savepoint: undone, it also frees a lock that was granted as the wait timed out."""
        deadline, most = self._request.deadline, self._options.max_block
        limit = most if self._raw() is not None else min(BLOCKING_PIECE, most)
        self._execute(f"SAVEPOINT {_SAVEPOINT}")
        try:
            before = self._row(sql.TIMEOUTS_IN_TRANSACTION)
            while True:
                now = time.monotonic()
                until = now + limit if deadline is None else min(deadline, now + limit)
                if self._take_all(until):
                    self._row(sql.SET_TIMEOUTS_IN_TRANSACTION, before)
                    self._execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")
                    return True
                self._execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
                if until == deadline:
                    break
        except BaseException:
            self._recover()
            raise
        self._execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        return False

    def _take_all(self, until: float) -> bool:
        """Take one key after the other, and wait for each until the monotonic time `until`; False: one was kept."""
        for key in self._request.keys:
            if len(self._request.keys) > 1 and self._try(key):
                continue
            piece = until - time.monotonic()
            if piece <= 0:
                return False
            self._row(sql.SET_TIMEOUTS_IN_TRANSACTION, [str(max(1, round(piece * 1000))), "0"])
            if not self._wait_piece(key, until + protocol.GRACE):
                return False
        return True

    def _wait_piece(self, key: LockKey, until: float) -> bool:
        """Block in the server for the `lock_timeout` that is set; False when it passed."""
        from django.db import OperationalError

        raw = self._raw()
        statement = sql.wait_in_transaction(shared=self._request.shared)
        try:
            if raw is None:
                self._row(statement, [key.number])
            else:
                drive(protocol.query(raw.pgconn, (statement % key.number).encode(), until))
        except protocol.ServerRefusedError as refused:
            if refused.sqlstate != sql.LOCK_NOT_AVAILABLE:
                raise
            return False
        except OperationalError as error:
            if _sqlstate(error) != sql.LOCK_NOT_AVAILABLE:
                raise
            return False
        return True

    def _recover(self) -> None:
        """Bring the transaction back to where it was before the wait; close the connection when that can't be done."""
        from django.db import Error

        try:
            self._end_statement()
            self._execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            self._execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        except (Error, PsycopgError, protocol.ServerGoneError):
            self._connection.close()

    def _raw(self) -> Connection[Any] | None:
        """Give psycopg 3's connection: its wait can be driven from here, but in a pipeline. Psycopg 2 blocks in C."""
        raw = self._connection.connection
        is_ours = isinstance(raw, Connection) and raw.pgconn.pipeline_status == pq.PipelineStatus.OFF
        return raw if is_ours else None

    def _execute(self, statement: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)

    def _row(self, statement: str, params: Sequence[object] | dict[str, object] = ()) -> Sequence[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, params)
            row: Sequence[Any] = cursor.fetchone()
            return row


def _is_begun(raw: Connection[Any]) -> bool:
    return bool(raw.pgconn.transaction_status == pq.TransactionStatus.INTRANS)


def end_statement(pgconn: PGconn) -> None:
    """Cancel the statement under way, and read what it still answers.

    Raises: ServerGoneError: it did not end in time.
    """
    until = time.monotonic() + CANCEL_TIMEOUT
    drive(cancel_steps(pgconn))
    with contextlib.suppress(protocol.ServerRefusedError):
        drive(protocol.answer(pgconn, until))


def _sqlstate(error: Exception) -> str:
    """Give the SQLSTATE under a Django error, of either driver; '' when the server said none."""
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or ""
