"""All locks of a database, held and awaited, with the texts of their keys.

The server knows numbers only. So each lock session listens on a channel, and its process answers who asks there: no
table, and nothing that an acquisition pays for. A process that can't answer (it is stopped, or of another language)
shows its number. A waiter can't answer, but who holds what it waits for can.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from concurrency_safe.core.errors import LockUnavailable
from concurrency_safe.core.keys import LockKey, slot_numbers
from concurrency_safe.core.options import MOST_SLOTS
from concurrency_safe.core.steps import READ, SocketWait, Steps

from . import protocol, sql
from .inspect import session_name
from .protocol import ServerGoneError, ServerRefusedError

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

    from concurrency_safe.core.sessions import Borrower

    from .backend import PostgresBackend
    from .session import LockSession

#: Seconds that holders have for an answer: their watcher looks once a second.
PATIENCE = 1.5


#: Bytes of one answer; a notification holds less than 8000.
_ANSWER = 7000


@dataclass(frozen=True, slots=True)
class LockRow:
    """A lock that is held, or waited for.

    `key`: None: nobody has told the text for `number`. `host`, `pid`: of the client's process, '' and None when it
    isn't known. `work`: whose work it is for (a task's id), '' when it has no name. `since`: seconds since 1970, by the
    server's clock; None: the server may not tell us.
    """

    number: int
    key: str | None
    held: bool
    shared: bool
    host: str
    pid: int | None
    work: str
    backend_pid: int
    application: str
    since: float | None


@dataclass(frozen=True, slots=True)
class Census:
    """All locks at one moment. `used`, `room`: of the server's lock table. `now`: the server's clock, as `since`."""

    locks: tuple[LockRow, ...]
    used: int
    room: int
    now: float


def is_channel(name: bytes) -> bool:
    """Say whether `name` is one at which an asker may wait for answers."""
    return re.fullmatch(rb"concurrency_safe_[0-9a-f]{16}", name) is not None


def answers(session: LockSession) -> Iterator[bytes]:
    """Give the texts of what a session holds, in pieces that fit a notification; the last one is empty.

    Each is a list of (number that is locked, number of the key, the key's text, seconds that it has been held; None: it
    was released meanwhile).
    """
    now = time.monotonic()
    texts: list[tuple[int, LockKey, float | None]] = [
        (number, hold.key, round(now - hold.since, 3)) for number, hold in tuple(session.held.items())
    ]
    if session.last is not None and session.last[0] not in session.held:
        texts.append((*session.last, None))
    piece: list[bytes] = []
    for number, key, seconds in texts:
        text = json.dumps([number, key.number, _cut(key.text), seconds]).encode()
        if sum(map(len, piece)) + len(text) > _ANSWER:
            yield b"[%s]" % b",".join(piece)
            piece = []
        piece.append(text)
    if piece:
        yield b"[%s]" % b",".join(piece)
    yield b"[]"


def _cut(text: str) -> str:
    """Give a key's text, or its beginning with a sign, so that it fits a notification also when it is escaped."""
    kept = text[:1000]
    while len(json.dumps(kept)) > _ANSWER - 200:
        kept = kept[: len(kept) // 2]
    return kept if kept == text else f"{kept}…"


def take_census(backend: PostgresBackend, borrower: Borrower, named: Sequence[LockKey]) -> Steps[Census]:
    """List all locks of this library in the database; `named`: keys whose texts are known.

    After anything but a return the caller lets `backend.undo` run.

    Raises: LockUnavailable, ConfigurationError.
    """
    try:
        session = yield from backend.pool.lend(borrower, (), session_name(borrower.work), empty=False)
        pgconn = session.pgconn
        channel = f"concurrency_safe_{secrets.token_hex(8)}"
        asks = session.capacity > 0  # not behind a pooler in transaction mode, where nobody listens
        if asks:
            ask = f"LISTEN {channel}; SELECT pg_notify('{sql.QUESTION}', '{channel}')"
            yield from protocol.query(pgconn, ask.encode())
        rows = _rows((yield from protocol.query(pgconn, sql.census(pgconn.server_version))))
        full = yield from protocol.query(pgconn, sql.FULLNESS)
        told: _Told = {}
        for answer in answers(session):  # our own; the watcher leaves a session alone that is in use
            _hear(told, session.pid, json.loads(answer))
        if asks:
            asked = {row.backend_pid for row in rows if row.held and row.pid is not None}
            yield from _listen(pgconn, channel, asked - {session.pid}, told)
            yield from protocol.query(pgconn, f"UNLISTEN {channel}".encode())
        yield from backend.pool.free(borrower)
    except (ServerGoneError, ServerRefusedError) as error:
        raise LockUnavailable(f"the locks can't be read: {str(error).strip()}") from error
    used, room, now = (float(full.get_value(0, column) or 0) for column in range(3))
    locks = sorted(_named(rows, told, named, now), key=lambda row: not row.held)  # stable: the queues stay
    return Census(tuple(locks), int(used), int(room), now)


def _rows(result: PGresult) -> list[LockRow]:
    rows = []
    for line in range(result.ntuples):
        number, granted, shared, backend_pid, application, address, since = (
            (result.get_value(line, column) or b"").decode(errors="replace") for column in range(7)
        )
        ours, _, rest = application.partition(":")
        host, pid, work = (*rest.split(":", 2), "", "")[:3]
        known = ours == "cs" and pid.isdigit()
        rows.append(
            LockRow(
                int(number),
                None,
                granted == "t",
                shared == "t",
                host if known else address,
                int(pid) if known else None,
                work if known else "",
                int(backend_pid),
                application,
                float(since) if since else None,
            )
        )
    return rows


#: What holders have told: (their backend pid, the number that is locked) -> the key's number, its text, seconds held or
#: None.
_Told = dict[tuple[int, int], tuple[int, str, float | None]]


def _listen(pgconn: PGconn, channel: str, waiting: set[int], told: _Told) -> Steps[None]:
    """Read the answers, until all sessions of `waiting` have told everything, or no more time is left."""
    until = time.monotonic() + PATIENCE
    while True:
        while (notify := pgconn.notifies()) is not None:
            if notify.relname.decode() == channel:
                answer = json.loads(notify.extra)
                _hear(told, notify.be_pid, answer)
                if not answer:
                    waiting.discard(notify.be_pid)
        if not waiting or not (yield SocketWait(pgconn.socket, READ, until)):
            return
        pgconn.consume_input()


def _hear(told: _Told, backend_pid: int, answer: list[Any]) -> None:
    for number, of_key, text, seconds in answer:
        told[backend_pid, number] = (of_key, text, seconds)


def _named(rows: list[LockRow], told: _Told, named: Sequence[LockKey], now: float) -> Iterator[LockRow]:
    """Give the locks of this library, with what is known of each."""
    texts = {of_key: text for of_key, text, _ in told.values()} | {key.number: key.text for key in named}
    numbers = dict(texts)
    gates: set[int] = set()  # where those who wait for a slot queue: the first of them holds it
    for key in (*named, *(LockKey(text, number) for number, text in texts.items())):
        gate, *slots = slot_numbers(key, MOST_SLOTS if key in named else 0)
        gates.add(gate)
        numbers |= dict.fromkeys((gate, *slots), key.text)
    numbers |= {number: text for (_, number), (_, text, _) in told.items()}
    for row in rows:
        known = numbers.get(row.number)
        if known is None and row.pid is None:
            continue  # somebody else's advisory lock, or nobody knows it
        mine = told.get((row.backend_pid, row.number)) if row.held else None
        yield replace(
            row,
            key=known,
            held=row.held and row.number not in gates,
            since=row.since if mine is None or mine[2] is None else now - mine[2],
        )
