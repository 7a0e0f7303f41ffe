"""One private connection of the library: opening it, proving what it is, ending it.

A session is never shared with Django or with the body of a guarded block, so nothing that they do (close, roll back,
return to a pool) can lose or leak a lock.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psycopg import OperationalError, ProgrammingError, conninfo, pq
from psycopg.pq.abc import PGconn, PGresult

from concurrency_safe.core.errors import ConfigurationError, LockUnavailable
from concurrency_safe.core.keys import LockKey
from concurrency_safe.core.sessions import Borrower, Hold, Request
from concurrency_safe.core.steps import READ, Steps

from . import protocol, sql
from .census import answers, is_channel
from .waiting import wait_socket

#: Seconds for opening a connection, where the DSN says nothing (libpq's connect_timeout).
CONNECT_TIMEOUT = 10.0

#: Seconds that ending an interrupted statement may take, so that an interrupt surfaces within 250 ms.
CANCEL_TIMEOUT = 0.1

#: Seconds that cleaning a shared session may take after an interrupt; past them it is closed.
SETTLE_TIMEOUT = 0.1

#: Seconds that a holder's session may be without traffic before it is asked for a sign of life, and for the answer:
#: with the time between two looks, a silent cut is found within 30 s.
HEARTBEAT = 10.0
HEARTBEAT_TIMEOUT = 3.0

#: What libpq gets where the DSN says nothing: a silent cut is found within 30 s also by an idle client.
#: Source: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
CONNECTION_DEFAULTS: Mapping[str, str] = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}

#: Oldest server that is supported, as libpq numbers it.
OLDEST_SERVER = 130000

#: The first libpq that can cancel without blocking, as it numbers itself.
LIBPQ_WITH_CANCEL = 170000

#: How often a pooler is asked whose server process is whose.
POOLER_ROUNDS = 3


class Grant(NamedTuple):
    """What was granted: the numbers, in the request's order, and the fencing token (None: not enabled)."""

    numbers: Sequence[int]
    token: int | None


class LockSession:
    """A connection in autocommit mode that holds locks, or waits for one.

    Several locks may share it: each statement belongs to one borrower (`user`), and no statement waits for a lock while
    another one is held. What it may hold without an owner is written down in `debts` before the statement is sent.
    """

    __slots__ = (
        "__weakref__",
        "blocked",
        "dead",
        "debts",
        "held",
        "home",
        "last",
        "name",
        "pgconn",
        "pid",
        "used_at",
        "user",
        "wire",
    )

    #: Most locks that one session holds; each statement's end walks its table of locks.
    capacity = 250

    def __init__(self, pgconn: PGconn, pid: int) -> None:
        """Take over `pgconn`; `pid` is the server process behind it."""
        self.pgconn = pgconn
        self.pid = pid
        self.wire = protocol.Wire(pgconn)
        #: The monotonic time of the last use: idle since then, when nothing is held.
        self.used_at = time.monotonic()
        #: The application_name that was set last; None: unknown, so the next user sets it.
        self.name: str | None = None
        #: Whose statement is under way; None: anybody may send one.
        self.user: Borrower | None = None
        #: Whether that statement waits in the server for a lock.
        self.blocked = False
        #: The event loop whose locks are held here, or None: threads'. Means nothing while none is held.
        self.home: object = None
        #: What is held here, by number.
        self.held: dict[int, Hold] = {}
        #: What was released here last, and its number: who asks may have seen it held.
        self.last: tuple[int, LockKey] | None = None
        #: What may be held here although nobody owns it (number, shared): released before the next use.
        self.debts: set[tuple[int, bool]] = set()
        #: Whether it was seen to be cut.
        self.dead = False

    def try_acquire(
        self, request: Request, numbers: Sequence[int], name: str, kind: sql.Kind, *, fenced: bool
    ) -> Steps[Grant | None]:
        """Take all of `numbers` (or one slot of them, behind the gate) if they are free; None when they aren't.

        Raises: ServerRefusedError, ServerGoneError.
        """
        named = self.name != name
        statement = sql.try_statement(kind, shared=request.shared, fenced=fenced, named=named)
        params = [b"%d" % numbers[0] if kind == "one" else b"{%s}" % b",".join([b"%d" % one for one in numbers])]
        if named:
            self.name = None
            params.append(name.encode())
        for number in numbers:
            self.debts.add((number, request.shared))
        result = yield from protocol.execute(self.wire, statement, params)
        self.name = name
        got = result.get_value(0, 0)
        if got is None or got == b"f":
            if kind != "head":  # whose gate is held still
                self.debts.difference_update((number, request.shared) for number in numbers)
            return None
        if kind in ("slot", "head"):
            numbers = (int(got),)
        return Grant(numbers, token_of(result, 1) if fenced else None)

    def wait_acquire(
        self, request: Request, numbers: Sequence[int], name: str, max_block: float, *, fenced: bool
    ) -> Steps[Grant | None]:
        """Wait for all of `numbers`, in the server; None when the request's deadline passed. See `protocol`."""
        debts = [(number, request.shared) for number in numbers]
        self.debts.update(debts)
        texts = [b"%d" % number for number in numbers]
        known, self.name = self.name, None
        result = yield from protocol.wait_acquire(
            self.wire,
            texts,
            request.deadline,
            max_block,
            shared=request.shared,
            fenced=fenced,
            name=None if known == name else name.encode(),
        )
        if result is None:  # and the name was taken back with the statement
            self.name = name if known == name else None
            self.debts.difference_update(debts)
            return None
        self.name = name
        return Grant(tuple(numbers), token_of(result, 0) if fenced else None)

    def release(self, numbers: Sequence[int], *, shared: bool) -> Steps[bool]:
        """Release `numbers`, which are held in this mode; False: one of them was not held (the server warns).

        Raises: ServerRefusedError, ServerGoneError.
        """
        many = len(numbers) > 1
        statement = sql.release_statement(shared=shared, many=many)
        param = b"{%s}" % b",".join(b"%d" % number for number in numbers) if many else b"%d" % numbers[0]
        result = yield from protocol.execute(self.wire, statement, [param])
        return result.get_value(0, 0) == b"t"

    def settle(self) -> Steps[None]:
        """After an interrupt: read what is still under way, then release what nobody owns.

        Raises: ServerRefusedError, ServerGoneError: it can't be done in time.
        """
        until = time.monotonic() + SETTLE_TIMEOUT
        if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            with contextlib.suppress(protocol.ServerRefusedError):
                try:
                    yield from protocol.answer(self.pgconn, until)
                except OperationalError as error:
                    raise protocol.ServerGoneError(str(error)) from error
        self.wire.prepared.clear()  # which statements were prepared is not known any more
        self.name = None
        debts = tuple(self.debts)
        unlock = b"".join(
            b"; SELECT pg_advisory_unlock%s(%d)" % (b"_shared" if shared else b"", number) for number, shared in debts
        )
        yield from protocol.query(self.pgconn, b"DEALLOCATE ALL" + unlock, until)  # in one round trip
        self.debts.difference_update(debts)

    def beat(self) -> Steps[None]:
        """Ask for a sign of life.

        Raises: ServerRefusedError, ServerGoneError.
        """
        yield from protocol.query(self.pgconn, b"SELECT 1", time.monotonic() + HEARTBEAT_TIMEOUT)

    def asked(self) -> list[bytes]:
        """Give the channels of those who asked, since the last call, what is held here."""
        channels = []
        while (notify := self.pgconn.notifies()) is not None:
            if is_channel(notify.extra):  # anybody may send anything
                channels.append(notify.extra)
        return channels

    def tell(self, channel: bytes) -> Steps[None]:
        """Answer there what is held here, or was just now; a server that refuses the answer costs nobody a lock.

        Raises: ServerGoneError.
        """
        until = time.monotonic() + HEARTBEAT_TIMEOUT
        escaping = pq.Escaping(self.pgconn)
        with contextlib.suppress(protocol.ServerRefusedError):
            for answer in answers(self):
                literal = bytes(escaping.escape_literal(answer))
                yield from protocol.query(self.pgconn, b"SELECT pg_notify('%s', %s)" % (channel, literal), until)

    def holders(self, statement: sql.Statement, numbers: Sequence[int]) -> Steps[PGresult]:
        """Ask who holds `numbers`, or waits for them: rows of backend pid, application_name, client address."""
        param = b"{%s}" % b",".join(b"%d" % number for number in numbers)
        return protocol.execute(self.wire, statement, [param])

    def is_dead(self) -> bool:
        """Say, without a query, whether the server has closed this idle session."""
        if self.dead or self.pgconn.status != pq.ConnStatus.OK:
            return True
        # A terminated backend sends its error first, the end of file comes behind it: read until nothing is left.
        while wait_socket(self.pgconn.socket, READ, 0):
            try:
                self.pgconn.consume_input()
                self.pgconn.is_busy()  # parses what came: a notice, a changed parameter, a farewell
            except OperationalError:
                return True
            if self.pgconn.status != pq.ConnStatus.OK:
                return True
        return False

    def end(self) -> Steps[None]:
        """End the session whatever it is doing: the server drops its wait, then its locks. Raises no error."""
        self.dead = True
        try:
            if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                # A backend that blocks doesn't see that its client is gone: it would stay in the queue.
                yield from cancel_steps(self.pgconn)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the socket, without waiting for anything."""
        self.dead = True
        self.pgconn.finish()


def token_of(result: PGresult, column: int) -> int:
    """Read a fencing token."""
    return int(result.get_value(0, column) or 0)


def cancel_steps(pgconn: PGconn) -> Steps[None]:
    """Ask the server to end the statement under way, for at most `CANCEL_TIMEOUT` seconds; a failure is no error."""
    with contextlib.suppress(protocol.ServerGoneError, OperationalError):
        if pq.version() >= LIBPQ_WITH_CANCEL and hasattr(pgconn, "cancel_conn"):
            yield from protocol.cancel(pgconn, time.monotonic() + CANCEL_TIMEOUT)
        else:  # pragma: no cover - libpq before 17 has the blocking form only
            pgconn.get_cancel().cancel()


def complete_conninfo(dsn: str) -> str:
    """Give `dsn` with the library's defaults for what it leaves open.

    Raises: ConfigurationError: libpq can't read it. The text is not repeated, since it may hold a password.
    """
    try:
        given = conninfo.conninfo_to_dict(dsn)
    except ProgrammingError:  # whose words repeat a part of it
        given = {"port": "?"}
    # Or a part of a password with a / or a @ in it.
    if not re.fullmatch("[0-9,]*", str(given.get("port") or "")) or "@" in str(given.get("host") or "")[1:]:
        scheme, is_url, _ = dsn.partition("://")
        wrong = is_url and re.fullmatch("(?!postgres(ql)?$)[a-z+0-9]+", scheme)
        raise ConfigurationError(
            f"the DSN of the lock store can't be read: {f'{scheme}:// is none of ours; ' if wrong else ''}write "
            "postgresql://user:password@host:5432/database, with special characters as %XX, or host=... dbname=..."
        )
    defaults = CONNECTION_DEFAULTS
    return conninfo.make_conninfo(dsn, **{key: value for key, value in defaults.items() if key not in given})


def open_session(info: str) -> Steps[LockSession]:
    """Connect, set the session up, and prove that its locks will hold.

    Raises: LockUnavailable: no server, or one that can't be used now (a standby). ConfigurationError: a server, or a
        pooler before it, on which session locks can't work.
    """
    pgconn = yield from connect(info)
    try:
        # Nothing is set on a server process that a pooler may share with others.
        pid = yield from _set_up(pgconn, pgconn.backend_pid)
        if pid != pgconn.backend_pid:
            yield from _refuse_transaction_pooling(info, pgconn, pid)
            yield from _set_up(pgconn, None)
        yield from protocol.query(pgconn, sql.LISTEN)
    except (protocol.ServerGoneError, protocol.ServerRefusedError) as error:
        pgconn.finish()
        raise LockUnavailable(f"the lock store refused a new session: {str(error).strip()}") from error
    except BaseException:
        pgconn.finish()
        raise
    return LockSession(pgconn, pid)


def connect(info: str) -> Steps[PGconn]:
    """Open a connection to the first of the hosts that takes it; each has the time of `connect_timeout`.

    Raises: LockUnavailable.
    """
    errors = []
    for attempt in _attempts(info):
        try:
            return (yield from protocol.connect(attempt.encode(), time.monotonic() + _connect_timeout(info)))
        except protocol.ServerGoneError as error:
            errors.append(str(error).strip())
    raise LockUnavailable(f"the lock store can't be reached: {'; '.join(errors)}")


def _attempts(info: str) -> list[str]:
    """Give a DSN for each of the hosts of `info`: an asynchronous libpq does not leave a silent one.

    What doesn't fit together is left to libpq, which says so.
    """
    given = conninfo.conninfo_to_dict(info)
    lists = {name: str(given.get(name) or "").split(",") for name in ("host", "hostaddr", "port")}
    count = max(len(lists["host"]), len(lists["hostaddr"]))
    if any(len(values) not in (1, count) for values in lists.values()):
        return [info]
    hosts = [
        {name: values[number % len(values)] for name, values in lists.items() if name in given}
        for number in range(count)
    ]
    if given.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    return [conninfo.make_conninfo(info, **host) for host in hosts]


def _connect_timeout(info: str) -> float:
    given = conninfo.conninfo_to_dict(info).get("connect_timeout") or 0
    try:
        seconds = float(given)
    except ValueError:
        raise ConfigurationError(f"connect_timeout={given!r} of the lock store's DSN is no number of seconds") from None
    return seconds if seconds > 0 else CONNECT_TIMEOUT


def _set_up(pgconn: PGconn, expected: int | None) -> Steps[int]:
    """Send the session's settings, for the server process `expected` (None: any); return the one that there is."""
    version = pgconn.server_version
    try:
        row = yield from protocol.query(pgconn, sql.session_setup(version, expected))
    except protocol.ServerRefusedError as refused:
        if refused.sqlstate != sql.INVALID_PARAMETER:
            raise
        row = yield from protocol.query(pgconn, sql.session_setup(version, expected, check_interval=False))
    product = (row.get_value(0, 2) or b"").decode(errors="replace")
    refuse_impostor(product, version)
    refuse_standby(in_recovery=row.get_value(0, 1) == b"t")
    return int(row.get_value(0, 0) or 0)


def refuse_standby(*, in_recovery: bool) -> None:
    """Refuse a server whose locks the primary doesn't know.

    Raises: LockUnavailable.
    """
    if in_recovery:
        raise LockUnavailable(
            "the lock store is a standby (in recovery): it grants locks that the primary does not know; "
            "point the DSN at the primary, or add target_session_attrs=read-write to it"
        )


def refuse_impostor(product: str, version: int) -> None:
    """Refuse a server that speaks PostgreSQL's protocol, but whose advisory locks do nothing.

    Raises: ConfigurationError.
    """
    if not product.startswith("PostgreSQL") or "Redshift" in product:
        raise ConfigurationError(
            f"the lock store is {product!r}; its advisory locks do not exclude: use PostgreSQL 13 or later"
        )
    if version < OLDEST_SERVER:
        raise ConfigurationError(f"the lock store is PostgreSQL {version // 10000}; at least 13 is needed")


def _refuse_transaction_pooling(info: str, pgconn: PGconn, pid: int) -> Steps[None]:
    """Find out what the pooler in between does: only one that keeps a server process per client is safe.

    The pid of the protocol is the pooler's own here. While a client is idle, a pooler in transaction mode lends its
    server process to the next one: so it gets another one itself, or a second client gets the same one, whichever of
    its idle ones the pooler takes (the last used, or the longest idle). Asked several times, since others use the pool.
    """
    other = yield from connect(info)
    ours, theirs = {pid}, set[int]()
    try:
        for _ in range(POOLER_ROUNDS):
            for client, pids in ((pgconn, ours), (pgconn, ours), (other, theirs), (other, theirs)):
                row = yield from protocol.query(client, b"SELECT pg_backend_pid()")
                pids.add(int(row.get_value(0, 0) or 0))
    finally:
        other.finish()
    if len(ours) > 1 or len(theirs) > 1 or ours == theirs:
        raise ConfigurationError(
            "a pooler in transaction mode (PgBouncer or the like) stands before the lock store: session locks would be "
            "shared and lost there; give the library a direct connection (CONCURRENCY_SAFE = {'DSN': "
            "'postgresql://...'}), or a pool in session mode, or say CONCURRENCY_SAFE = {'POOLER': 'transaction'}"
        )
