"""What the library needs to know of a Django connection: where it leads, and whether it is inside a transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, cast

from psycopg import conninfo, pq

from concurrency_safe.core.errors import ConfigurationError, LockUnavailable
from concurrency_safe.core.steps import Steps

from . import protocol
from .session import complete_conninfo, connect

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def connection_of(alias: str) -> BaseDatabaseWrapper:
    """Give this thread's Django connection for `alias`; nothing connects.

    Raises: ConfigurationError: there is no such alias.
    """
    connections = _connections()
    try:
        connection: BaseDatabaseWrapper = connections[alias]
    except connections.exception_class:
        known = ", ".join(repr(name) for name in connections)
        raise ConfigurationError(f"there is no database alias {alias!r}; DATABASES has {known}") from None
    return connection


@lru_cache(maxsize=1)
def _connections() -> Any:  # noqa: ANN401 - Django has no types
    """Give Django's connections, of whatever thread asks them; an import costs more than a look."""
    from django.db import connections

    return connections


def transaction_of(connection: BaseDatabaseWrapper) -> object | None:
    """Give what stands for the transaction that is open: the outermost atomic block; None: there is none.

    The blocks that Django's TestCase wraps around a test don't count, as they don't for `atomic(durable=True)`: the
    code under test behaves as it does in production. Without autocommit and outside any block, it is the connection.
    """
    if connection.in_atomic_block:
        return next((block for block in connection.atomic_blocks if not getattr(block, "_from_testcase", False)), None)
    # An alias without autocommit has a transaction as soon as it is connected.
    autocommit = connection.settings_dict["AUTOCOMMIT"] if connection.connection is None else connection.autocommit
    return None if autocommit else connection


def other_in_transaction(alias: str) -> str | None:
    """Name another alias of this thread that is inside a transaction; None: there is none."""
    connections = _connections()
    if len(connections.settings) == 1:
        return None
    for connection in connections.all(initialized_only=True):
        if connection.alias != alias and connection.connection is not None and transaction_of(connection) is not None:
            return cast("str", connection.alias)
    return None


def require_postgresql(connection: BaseDatabaseWrapper) -> None:
    """Refuse an alias of another engine.

    Raises: ConfigurationError.
    """
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f"the database alias {connection.alias!r} is {connection.vendor}, which has no advisory locks as "
            "PostgreSQL's; name a PostgreSQL alias (CONCURRENCY_SAFE = {'USING': ...}) or give the locks a PostgreSQL "
            "server of their own (CONCURRENCY_SAFE = {'DSN': 'postgresql://...'})"
        )


def dsn_of(connection: BaseDatabaseWrapper) -> str:
    """Give a DSN to the database where `connection` leads now (in a test run: the test database)."""
    require_postgresql(connection)
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    params = connection.get_connection_params()
    return conninfo.make_conninfo(
        **{name: value for name, value in params.items() if name in known and value is not None}
    )


def verify_one_space(dsn: str, alias_dsn: str, alias: str) -> Steps[None]:
    """Make sure that a lock taken through `dsn` excludes one taken on the connection of `alias`.

    Raises: ConfigurationError: they lead to different databases. LockUnavailable: one of them can't be reached.
    """
    dsn = complete_conninfo(dsn)
    ours, theirs = conninfo.conninfo_to_dict(dsn), conninfo.conninfo_to_dict(alias_dsn)
    if all(ours.get(name) == theirs.get(name) for name in ("host", "hostaddr", "port", "dbname", "service")):
        return
    number = secrets.randbits(62)
    try:
        holder = yield from connect(dsn)
        try:
            # Held by an open transaction, so that the answer is right also behind a pooler in transaction mode.
            yield from protocol.query(holder, b"BEGIN")
            yield from protocol.query(holder, b"SELECT pg_advisory_xact_lock(%d)" % number)
            rival = yield from connect(alias_dsn)
            try:
                row = yield from protocol.query(rival, b"SELECT pg_try_advisory_xact_lock(%d)" % number)
            finally:
                rival.finish()
        finally:
            holder.finish()
    except (LockUnavailable, protocol.ServerGoneError, protocol.ServerRefusedError) as error:
        raise LockUnavailable(
            f"it could not be checked that DSN and the alias {alias!r} lead to the same database: {str(error).strip()}"
        ) from error
    if row.get_value(0, 0) == b"t":
        raise ConfigurationError(
            f"DSN and the database alias {alias!r} lead to different databases: a lock held until the commit of a "
            "transaction would not exclude one held by a session; point DSN at the database of the alias, or set "
            "USING to the alias of the DSN"
        )


def before_test_database_is_dropped(connection: BaseDatabaseWrapper, close: Callable[[], None]) -> None:
    """In a test run, let `close` run before Django drops a test database: an open session would make that fail.

    Django has no signal for it, so its method is wrapped, on the class (each thread has a connection of its own).
    """
    from django.test import utils

    creation: Any = type(connection.creation)
    if not hasattr(utils._TestState, "saved_data") or hasattr(creation, "_concurrency_safe"):  # noqa: SLF001
        return
    destroy = creation._destroy_test_db  # noqa: SLF001

    @wraps(destroy)
    def destroy_after_close(self: object, *args: object, **kwargs: object) -> None:
        close()
        destroy(self, *args, **kwargs)

    creation._destroy_test_db = destroy_after_close  # noqa: SLF001
    creation._concurrency_safe = True  # noqa: SLF001
