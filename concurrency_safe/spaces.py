"""Which lock space a lock belongs to: one database, with the sessions and the claims of this process."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from concurrency_safe.conf import Settings, get_settings, uses_django
from concurrency_safe.core.errors import ConfigurationError
from concurrency_safe.core.sessions import Backend, StoreOptions
from concurrency_safe.core.steps import Steps
from concurrency_safe.ownership import Footing, Ownership
from concurrency_safe.postgres import alias as aliases
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.loop import adrive, finish
from concurrency_safe.postgres.waiting import drive

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class LockSpace:
    """Where a key means one lock: the backend, and who owns what inside this process."""

    backend: Backend
    claims: Ownership
    options: StoreOptions


#: The settings by which two spaces of one database differ.
_OF_A_SPACE = ("pool_size", "pool_idle", "max_block", "max_held", "fencing", "pooler")

_spaces: dict[tuple[object, ...], LockSpace] = {}
#: What was asked for last, and is mostly asked for next.
_last: tuple[str, Settings | None, LockSpace | None] = ("", None, None)
_own_claims: weakref.WeakKeyDictionary[object, Ownership] = weakref.WeakKeyDictionary()
_alias_dsns: dict[tuple[object, ...], str] = {}
_verified: set[tuple[str, str]] = set()


def django_connection(using: str | None, settings: Settings) -> BaseDatabaseWrapper | None:
    """Give this thread's connection of the alias in charge; None in a script without Django."""
    return aliases.connection_of(using or settings.using) if uses_django() else None


def space_at_hand(connection: BaseDatabaseWrapper | None, settings: Settings) -> LockSpace | None:
    """Give the lock space that was asked for last, when it is the one, and known to be right; None: `space_for` says.

    Raises: ConfigurationError: `connection` is no PostgreSQL's.
    """
    last_dsn, last_settings, space = _last
    if settings is not last_settings:
        return None
    if connection is None:
        return space if settings.dsn == last_dsn else None
    if settings.dsn is None:
        return space if _dsn_of(connection) == last_dsn else None
    is_one = connection.vendor != "postgresql" or (last_dsn, _dsn_of(connection)) in _verified
    return space if is_one and settings.dsn == last_dsn else None


def space_for(connection: BaseDatabaseWrapper | None, settings: Settings) -> Steps[LockSpace]:
    """Give the lock space of session scope, by the setting DSN or else the Django alias.

    Raises: ConfigurationError: neither leads to PostgreSQL, or they lead to different databases.
    """
    dsn, alias = settings.dsn, None
    if dsn is None:
        if connection is None:
            raise ConfigurationError(
                "there is no lock store: call concurrency_safe.configure(dsn='postgresql://...'), or set the "
                "environment variable CONCURRENCY_SAFE_DSN or DATABASE_URL, or configure Django"
            )
        dsn, alias = _dsn_of(connection), connection.alias
    elif connection is not None and connection.vendor == "postgresql":
        yield from _require_one_space(connection, dsn)
    global _last  # noqa: PLW0603 - a whole tuple each time, so that no thread sees half of it
    space = _space_named(dsn, settings, alias)
    _last = (dsn, settings, space)
    return space


def space_of(backend: object, settings: Settings) -> LockSpace:
    """Give the lock space of a backend of one's own.

    Raises: ConfigurationError: it is none.
    """
    verbs = ("acquire", "conflict", "release", "undo", "prove", "is_lost")
    if not all(callable(getattr(backend, verb, None)) for verb in verbs):
        raise ConfigurationError(
            f"backend={backend!r} is no lock store; give one such as concurrency_safe.memory.MemoryBackend(), "
            "or leave it out for PostgreSQL"
        )
    claims = _own_claims.setdefault(backend, Ownership(settings.max_held))
    return LockSpace(cast("Backend", backend), claims, _store_options(settings))


def _require_one_space(connection: BaseDatabaseWrapper, dsn: str) -> Steps[None]:
    """Check, once for each pair, that `dsn` and `connection` lead to the same database.

    Raises: ConfigurationError, LockUnavailable.
    """
    pair = (dsn, _dsn_of(connection))
    if pair not in _verified:
        yield from aliases.verify_one_space(*pair, connection.alias)
        _verified.add(pair)


def _store_options(settings: Settings) -> StoreOptions:
    return StoreOptions(
        settings.pool_size, settings.pool_idle, settings.max_block, settings.fencing, settings.pooler == "transaction"
    )


def _dsn_of(connection: BaseDatabaseWrapper) -> str:
    given = connection.settings_dict
    where = (
        connection.alias,
        connection.vendor,
        given["NAME"],
        given["HOST"],
        given["PORT"],
        given["USER"],
        given["PASSWORD"],
    )
    dsn = _alias_dsns.get(where)
    if dsn is None:
        dsn = _alias_dsns[where] = aliases.dsn_of(connection)
        aliases.before_test_database_is_dropped(connection, close_idle_sessions)
    return dsn


def _space_named(dsn: str, settings: Settings, alias: str | None) -> LockSpace:
    name = (dsn, *(getattr(settings, each) for each in _OF_A_SPACE))
    space = _spaces.get(name)
    if space is None:
        # A password may be new each time (of a cloud's, or a vault's): Django asks for it at each connection.
        now = None if alias is None else lambda: aliases.dsn_of(aliases.connection_of(alias))
        options = _store_options(settings)
        backend = PostgresBackend(dsn, options, now)
        # setdefault: of two threads that come here first, both must get the same claims.
        space = _spaces.setdefault(name, LockSpace(backend, Ownership(settings.max_held), options))
    return space


def ask(statement: Callable[[PostgresBackend, Footing], Steps[_T]]) -> _T:
    """Ask the lock store by the settings something that takes no lock.

    Raises: what `statement` raises; LockUnavailable, ConfigurationError: there is no store.
    """
    backend = drive(_backend())
    footing = Footing(None)
    try:
        return drive(statement(backend, footing))
    except BaseException:
        drive(backend.undo(footing, ()))
        raise


async def aask(statement: Callable[[PostgresBackend, Footing], Steps[_T]]) -> _T:
    """See `ask`; the event loop goes on."""
    backend = await adrive(_backend())
    footing = Footing(None, asyncio.get_running_loop())
    try:
        return await adrive(statement(backend, footing))
    except BaseException:
        await finish(backend.undo(footing, ()))
        raise


def _backend() -> Steps[PostgresBackend]:
    settings = get_settings()
    space = yield from space_for(django_connection(None, settings), settings)
    # By a setting's DSN or a Django alias it is PostgreSQL's.
    return cast("PostgresBackend", space.backend)


def close_idle_sessions() -> None:
    """End the idle sessions of every space of this process (before a database is dropped, at a worker's end)."""
    for space in list(_spaces.values()):
        space.backend.close()
