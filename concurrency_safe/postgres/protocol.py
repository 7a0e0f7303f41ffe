"""The conversation with PostgreSQL, as rules: which statement, in which order, and what each answer means.

Each rule is a generator that yields the socket waits (see `core.steps`); nothing here blocks, though an answer is
looked for before the wait for it (`SPIN`), and nothing here knows threads or asyncio. Raw libpq, since psycopg's own
wait can't be left by a signal handler's exception without an abandoned statement that is granted the lock later, and
costs twice the time.
Source: https://www.postgresql.org/docs/current/libpq-async.html
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from psycopg import OperationalError, pq
from psycopg.pq.abc import PGconn, PGresult

from concurrency_safe.core.steps import READ, TURN, WRITE, CallWait, Gate, GateWait, SocketWait, Steps

from . import sql
from .sql import Statement

#: Seconds that a server may keep silent about a statement that doesn't wait for a lock. Longer than any pause of a
#: healthy server, shorter than a person's patience.
STALL = 10.0

#: Seconds past `lock_timeout` by which the server must have ended the wait; after them the client ends it.
GRACE = 1.0

#: Seconds for which an answer is looked for before the wait for it begins, where the last one came without a wait, or
#: within `BRISK`.
#: Measured (docs/decisions/0015-look-before-sleep.md): a pair of statements takes 43 us so, and 142 without.
SPIN = 50e-6
BRISK = 150e-6

#: Lets others run: on one processor it is the server's turn then. macOS and Windows have no such call.
_give_way: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))  # noqa: TID251 - 0 is no sleep

_OK = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)


class ServerGoneError(Exception):
    """The server can't be reached, closed the connection, or keeps silent: the session is of no more use."""


class ServerRefusedError(Exception):
    """The server answered a statement with an error; `sqlstate` says which."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


#: Every connection of this process, from its start. No WeakSet: its callbacks would swallow what a signal handler
#: raises in them.
_started: dict[int, weakref.ref[PGconn]] = {}


def _start(conninfo: bytes) -> PGconn:
    for number, reference in tuple(_started.items()):
        if reference() is None:
            _started.pop(number, None)
    pgconn = pq.PGconn.connect_start(conninfo)
    _started[id(pgconn)] = weakref.ref(pgconn)
    return pgconn


def _drop_in_child() -> None:
    """Close the parent's sockets in a forked child, without a word to the server.

    A polite farewell would end the parent's session; an open copy would keep its locks alive after its death.
    """
    for reference in _started.values():
        pgconn = reference()
        if pgconn is not None:
            with contextlib.suppress(OSError, OperationalError):  # it is finished
                os.close(pgconn.socket)
    _started.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_drop_in_child)


def connect(conninfo: bytes, until: float) -> Steps[PGconn]:
    """Open a connection by the monotonic time `until`.

    Raises: ServerGoneError.
    """
    started: list[PGconn] = []
    try:
        # Looking up a host name blocks in C.
        yield CallWait(lambda: started.append(_start(conninfo)))
        (pgconn,) = started
        while True:
            status = pgconn.connect_poll() if pgconn.status != pq.ConnStatus.BAD else pq.PollingStatus.FAILED
            if status == pq.PollingStatus.OK:
                pgconn.nonblocking = 1
                return pgconn
            if status == pq.PollingStatus.FAILED:
                raise ServerGoneError(pgconn.get_error_message())
            events = READ if status == pq.PollingStatus.READING else WRITE
            if not (yield SocketWait(pgconn.socket, events, until)):
                raise ServerGoneError("the server did not answer the connection attempt in time")
    except BaseException:
        for pgconn in started:
            pgconn.finish()
        raise


class Pace:
    """Whether the answers of a server come at once: then the next one is looked for before the wait for it begins."""

    __slots__ = ("is_brisk", "spent")

    def __init__(self) -> None:
        """Expect so of a server that is not known yet."""
        self.is_brisk = True
        #: Seconds spent on answers since the last one that was waited for: after `TURN` of them one is, all the same.
        self.spent = 0.0

    def learn(self, took: float, *, waited: bool) -> None:
        """Learn from an answer that took so many seconds.

        One that was there at a look came at once, however late the look: other threads have run, not the server.
        """
        if self.spent < TURN:  # else the wait was others' turn
            self.is_brisk = not waited or took < BRISK
        self.spent = 0.0 if waited else self.spent + took


class Wire:
    """A connection, and what is known of it: the statements prepared there, and the pace of its answers."""

    __slots__ = ("pace", "pgconn", "prepared")

    def __init__(self, pgconn: PGconn) -> None:
        """Take `pgconn` as it is after its start."""
        self.pgconn = pgconn
        self.prepared: set[bytes] = set()
        self.pace = Pace()


def execute(
    wire: Wire, statement: Statement, params: list[bytes] | None = None, until: float | None = None
) -> Steps[PGresult]:
    """Run a prepared statement; prepare it first, when this session hasn't yet.

    `until`: the monotonic time by which the answer must be there, and the server may block that long; None: `STALL`
    seconds from now, and the server answers at once.

    Raises: ServerRefusedError, ServerGoneError.
    """
    pgconn = wire.pgconn
    sent = time.monotonic()
    end = sent + STALL if until is None else until
    try:
        if statement.name not in wire.prepared:
            pgconn.send_prepare(statement.name, statement.text)
            yield from answer(pgconn, end)
            wire.prepared.add(statement.name)
        pgconn.send_query_prepared(statement.name, params)
        return (yield from answer(pgconn, end, wire.pace if until is None else None, sent))
    except OperationalError as error:
        raise ServerGoneError(str(error)) from error


def query(pgconn: PGconn, text: bytes, until: float | None = None, pace: Pace | None = None) -> Steps[PGresult]:
    """Run `text` by the simple protocol: for statements that a session sends once. `pace`: see `answer`.

    Raises: ServerRefusedError, ServerGoneError.
    """
    sent = time.monotonic()
    try:
        pgconn.send_query(text)
        return (yield from answer(pgconn, sent + STALL if until is None else until, pace, sent))
    except OperationalError as error:
        raise ServerGoneError(str(error)) from error


def answer(pgconn: PGconn, until: float, pace: Pace | None = None, sent: float = 0.0) -> Steps[PGresult]:
    """Send what is buffered, then read the last result of the statement under way.

    `pace`: of a server that answers this statement, which was `sent` then, at once. The answer is looked for before the
    wait for it, since a server nearby answers in less time than it takes to fall asleep and to be woken; once in any
    case, since other threads may have run while the statement was sent. None: it is waited for.

    Raises: ServerRefusedError, ServerGoneError.
    """
    if pgconn.flush():
        yield from _send(pgconn, until)
    last = None
    looks = pace is not None and pace.spent < TURN
    spin_until = sent + SPIN if pace is not None and pace.is_brisk else 0.0
    while True:
        if not looks and not (yield SocketWait(pgconn.socket, READ, until)):
            raise ServerGoneError("the server did not answer in time")
        pgconn.consume_input()
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if pace is not None:
                    pace.learn(time.monotonic() - sent, waited=not looks)
                return last if last is not None and last.status in _OK else _refuse(pgconn, last)
            last = result
        looks = looks and time.monotonic() < spin_until
        if looks:
            _give_way()


def _send(pgconn: PGconn, until: float) -> Steps[None]:
    """Send the rest of what is buffered, while the server may be sending, too."""
    while pgconn.flush():
        if not (yield SocketWait(pgconn.socket, READ | WRITE, until)):
            raise ServerGoneError("the server did not read the statement in time")
        pgconn.consume_input()


def _refuse(pgconn: PGconn, result: PGresult | None) -> NoReturn:
    sqlstate = result.error_field(pq.DiagnosticField.SQLSTATE) if result is not None else None
    if sqlstate is None or pgconn.status == pq.ConnStatus.BAD:
        raise ServerGoneError(pgconn.get_error_message())
    message = (result and result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)) or b""
    raise ServerRefusedError(sqlstate.decode(), message.decode(errors="replace"))


def wait_acquire(  # noqa: PLR0913 - what a wait is about
    wire: Wire,
    numbers: Sequence[bytes],
    deadline: float | None,
    max_block: float,
    *,
    shared: bool,
    fenced: bool,
    name: bytes | None = None,
) -> Steps[PGresult | None]:
    """Wait for all of `numbers`, one after the other, until the monotonic time `deadline` (None: for ever).

    The session must hold nothing. The server waits, up to `max_block` seconds a piece: a waiter pins the oldest visible
    row version, which stops VACUUM and CREATE INDEX CONCURRENTLY, so it must not block without end. Between two pieces
    it gives back what it got, and loses its place. `name`: what the session's application_name becomes; None leaves it.

    Returns: the last answer, with the token; None when others kept one of them: the session holds nothing then.
    Raises: ServerRefusedError, ServerGoneError: what the session holds is unknown then; close it.
    """
    while (left := max_block if deadline is None else min(deadline - time.monotonic(), max_block)) > 0:
        until = time.monotonic() + left
        result: PGresult | None = None
        try:
            for number in numbers:
                piece = until - time.monotonic()
                last = number is numbers[-1]
                statement = sql.wait_statement(shared=shared, fenced=fenced and last, named=name is not None)
                # At least 1 ms: lock_timeout 0 would mean no timeout.
                params = [number, str(max(1, round(piece * 1000))).encode(), *([name] if name is not None else [])]
                result = yield from execute(wire, statement, params, until + GRACE)
        except ServerRefusedError as refused:
            if refused.sqlstate != sql.LOCK_NOT_AVAILABLE:
                raise
            yield from execute(wire, sql.RELEASE_ALL)
        else:
            return result
    return None


def pause(gate: Gate, until: float) -> Steps[None]:
    """Wait until the monotonic time `until`, at the waiter's own gate."""
    while time.monotonic() < until:
        yield GateWait(gate, until)


def cancel(pgconn: PGconn, until: float) -> Steps[None]:
    """Ask the server to end the statement under way; it needs libpq 17, older ones block (see `Session.discard`).

    Raises: ServerGoneError.
    """
    canceling = pgconn.cancel_conn()
    try:
        canceling.start()
        while (status := canceling.poll()) != pq.PollingStatus.OK:
            if status == pq.PollingStatus.FAILED:
                raise ServerGoneError(canceling.get_error_message())
            events = READ if status == pq.PollingStatus.READING else WRITE
            if not (yield SocketWait(canceling.socket, events, until)):
                raise ServerGoneError("the server did not answer the cancel request in time")
    except OperationalError as error:
        raise ServerGoneError(str(error)) from error
    finally:
        canceling.finish()
