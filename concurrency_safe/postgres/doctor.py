"""What `concurrency-safe doctor` finds out about a lock store that can be reached, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from concurrency_safe.core.errors import LockUnavailable
from concurrency_safe.core.steps import Steps

from . import protocol, sql
from .inspect import session_name
from .protocol import ServerGoneError, ServerRefusedError

if TYPE_CHECKING:
    from concurrency_safe.core.sessions import Borrower

    from .backend import PostgresBackend

#: The share of the lock table, or of the connections, above which it is time to do something.
FULL = 0.8


class Finding(NamedTuple):
    """One fact. `remedy`: what to do; empty: nothing is wrong. `grave`: locks don't work as they should."""

    fact: str
    remedy: str = ""
    grave: bool = False


def examine(backend: PostgresBackend, borrower: Borrower, *, fencing: bool) -> Steps[list[Finding]]:
    """Look at the lock store. That it is PostgreSQL, no standby, and no pooler shares our sessions, opening one proves.

    `fencing`: whether tokens are wanted. After anything but a return the caller lets `backend.undo` run.

    Raises: LockUnavailable, ConfigurationError: no session can be opened, or it may not look.
    """
    try:
        session = yield from backend.pool.lend(borrower, (), session_name(borrower.work), empty=False)
        row = yield from protocol.query(session.pgconn, sql.EXAMINE)
        different = yield from protocol.query(session.pgconn, sql.session_settings(session.pgconn.server_version))
        yield from backend.pool.free(borrower)
    except (ServerGoneError, ServerRefusedError) as error:
        raise LockUnavailable(f"the lock store can't be examined: {str(error).strip()}") from error
    version, user, sees, ticks, fence, used, room, connections, most, database = (
        (row.get_value(0, column) or b"").decode() for column in range(10)
    )
    pooled = session.capacity == 0
    findings = [
        Finding(f"PostgreSQL {version}, database {database}, user {user}; it is no standby"),
        Finding(f"locks are held by {'open transactions, behind a pooler' if pooled else 'sessions of our own'}"),
        _names(user, sees=sees == "t"),
        _there("the table of ticks", ticks == "t", wanted=False, what_for="once_per, --once-per and --tick need it"),
        _there("the sequence of fencing tokens", fence == "t", wanted=fencing, what_for="the setting FENCING needs it"),
        _room("lock table", int(used), int(room), "hold fewer locks at a time, or raise max_locks_per_transaction"),
        _room("connections", int(connections), int(most), "close some, or raise max_connections"),
    ]
    if not pooled:  # whose settings are the transaction's
        findings += [
            Finding(
                f"our sessions have {(different.get_value(line, 0) or b'').decode()} = "
                f"{(different.get_value(line, 1) or b'').decode()!r}, which they have set otherwise",
                "let what stands between (a pooler?) pass on the settings of a session",
                grave=True,
            )
            for line in range(different.ntuples)
        ]
    return findings


def _names(user: str, *, sees: bool) -> Finding:
    if sees:
        return Finding("the holder of a lock can be named, whoever it is")
    return Finding(
        f"{user} may not see the sessions of other users: a lock that one of them holds has no host and no pid",
        f"GRANT pg_read_all_stats TO {user}",
    )


def _there(what: str, there: bool, *, wanted: bool, what_for: str) -> Finding:  # noqa: FBT001 - the fact itself
    if there:
        return Finding(f"{what} is there")
    return Finding(
        f"{what} is not there; {what_for}",
        "python manage.py migrate concurrency_safe, or concurrency-safe init",
        grave=wanted,
    )


def _room(what: str, used: int, most: int, remedy: str) -> Finding:
    share = used / most
    return Finding(f"{what}: {used} of about {most} in use ({share:.0%})", remedy if share > FULL else "")
