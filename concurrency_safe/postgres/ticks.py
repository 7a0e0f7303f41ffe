"""The table of ticks: which scheduled runs were begun, and which of them succeeded.

Each statement is one round trip in autocommit, sent while the lock of the job is held: by the session that holds it,
where that is possible. So no two hosts claim at once, and a row without success is a run that failed, or whose process
is dead. By the simple protocol, which every pooler understands.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from psycopg import pq
from psycopg.pq.abc import PGresult

from concurrency_safe.core.errors import ConfigurationError, LockUnavailable
from concurrency_safe.core.keys import LockKey
from concurrency_safe.core.sessions import Borrower
from concurrency_safe.core.steps import Steps
from concurrency_safe.core.ticks import TickRule

from . import protocol, sql
from .backend import PostgresBackend
from .inspect import session_name
from .protocol import ServerGoneError, ServerRefusedError

Quote = Callable[[str], str]


def claim(
    backend: PostgresBackend, borrower: Borrower, key: LockKey, rule: TickRule, waited: float
) -> Steps[float | None]:
    """Write down that the tick of now is run; give its time, in seconds since 1970. None: somebody ran it already.

    `waited`: seconds between the start of this run and now, which the lock took. After anything but a return the
    caller lets `backend.undo` run.

    Raises: ConfigurationError: there is no table. LockUnavailable.
    """

    def text(quote: Quote) -> str:
        return sql.claim_tick(rule, key.number, waited, quote(key.text), quote(socket.gethostname()), os.getpid())

    result = yield from _ask(backend, borrower, key, text)
    return float(result.get_value(0, 0) or 0) if result.ntuples else None


def succeed(backend: PostgresBackend, borrower: Borrower, key: LockKey, tick: float) -> Steps[None]:
    """Write down that the run of `tick` has succeeded, and forget the old ones of the job. See `claim`."""
    yield from _ask(backend, borrower, key, lambda _: sql.succeed_tick(key.number, tick))


def last_success(backend: PostgresBackend, borrower: Borrower, key: LockKey) -> Steps[float | None]:
    """Give the end of the last run that succeeded, in seconds since 1970; None: there is none. See `claim`."""
    result = yield from _ask(backend, borrower, key, lambda _: sql.last_success(key.number))
    value = result.get_value(0, 0)
    return None if value is None else float(value)


def create_tables(backend: PostgresBackend, borrower: Borrower) -> Steps[None]:
    """Create what the library keeps in the database, where it is missing: the table of ticks, and the fence's sequence.

    After anything but a return the caller lets `backend.undo` run.

    Raises: LockUnavailable: no right to, say.
    """
    text = f"{sql.CREATE_TICK}; {sql.CREATE_FENCE}"
    yield from _ask(backend, borrower, LockKey("", 0), lambda _: text)


def _ask(backend: PostgresBackend, borrower: Borrower, key: LockKey, text: Callable[[Quote], str]) -> Steps[PGresult]:
    try:
        session = yield from backend.pool.lend(borrower, (), session_name(borrower.work), empty=False)
        escaping = pq.Escaping(session.pgconn)
        statement = text(lambda given: bytes(escaping.escape_literal(given.encode())).decode())
        result = yield from protocol.query(session.pgconn, statement.encode())
        yield from backend.pool.free(borrower)
    except (ServerGoneError, ServerRefusedError) as error:
        if getattr(error, "sqlstate", None) == sql.UNDEFINED_TABLE:
            raise ConfigurationError(
                f"once_per and tick need the table {sql.TICK}, which this database hasn't; run "
                "`python manage.py migrate concurrency_safe`, or `concurrency-safe init` in a project without Django"
            ) from error
        what = f"the ticks of {key.text!r}" if key.text else "what the library keeps"
        raise LockUnavailable(f"{what} can't be read or written: {str(error).strip()}", key.text or None) from error
    return result
