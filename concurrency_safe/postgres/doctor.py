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
    version, user, _, _, used, room, connections, most, database = (
        (row.get_value(0, column) or b"").decode() for column in range(9)
    )
    ticks, fence = row.get_value(0, 2), row.get_value(0, 3)
    pooled = session.capacity == 0
    findings = [
        Finding(f"PostgreSQL {version}, database {database}, user {user}; it is no standby"),
        Finding(f"locks are held by {'open transactions, behind a pooler' if pooled else 'sessions of our own'}"),
        _ours(f"the table of ticks, {sql.TICK},", ticks, user, "once_per, --once-per and --tick need it", wanted=False),
        _ours(
            f"the sequence of fencing tokens, {sql.FENCE},", fence, user, "the setting FENCING needs it", wanted=fencing
        ),
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


def _ours(what: str, lacks: bytes | None, user: str, what_for: str, *, wanted: bool) -> Finding:
    """Say whether a table is there and may be used; `lacks`: which privileges are missing, None: there is no table."""
    if lacks is None:
        return Finding(
            f"{what} is not there; {what_for}",
            "python manage.py migrate concurrency_safe, or concurrency-safe init",
            grave=wanted,
        )
    if not lacks:
        return Finding(f"{what} is there")
    kind, name = ("SEQUENCE", sql.FENCE) if lacks == b"USAGE" else ("TABLE", sql.TICK)
    privileges = lacks.decode()
    return Finding(
        f"{user} may not use {what} (no {privileges}); {what_for}",
        f"GRANT {privileges} ON {kind} {name} TO {user}",
        grave=wanted,
    )


def _room(what: str, used: int, most: int, remedy: str) -> Finding:
    share = used / most
    return Finding(f"{what}: {used} of about {most} in use ({share:.0%})", remedy if share > FULL else "")
