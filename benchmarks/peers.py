"""Other libraries' locks, as they are used: each takes and releases one lock that nobody else wants.

Those that are not installed are left out; `make bench` installs them into a folder of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

#: Takes and releases a lock so many times.
Pairs = Callable[[int], None]


def _blocks(make: Callable[[], Any]) -> Pairs:
    """Run empty `with` blocks, a lock made for each."""

    def run(pairs: int) -> None:
        for _ in range(pairs):
            with make():
                pass

    return run


def django_pglock(dsn: str, _: str, stack: ExitStack) -> Pairs:
    """Session lock on Django's connection."""
    import pglock
    from django.db import connection

    del dsn  # the settings have it
    stack.callback(connection.close)
    return _blocks(lambda: pglock.advisory("bench", timeout=0))


def django_pgware(dsn: str, _: str, stack: ExitStack) -> Pairs:
    """Session lock on Django's connection, by what django-pglocks has become."""
    from django.db import connection
    from django_pg_utils.locks import advisory_lock

    del dsn  # the settings have it
    stack.callback(connection.close)
    return _blocks(lambda: advisory_lock("bench", wait=False))


def sqlalchemy_dlock(dsn: str, _: str, stack: ExitStack) -> Pairs:
    """Session lock on one SQLAlchemy connection."""
    import sqlalchemy
    from sqlalchemy_dlock import create_sadlock

    connection = stack.enter_context(sqlalchemy.create_engine(_for_sqlalchemy(dsn)).connect())
    return _blocks(lambda: create_sadlock(connection, "bench"))


def pals(dsn: str, _: str, stack: ExitStack) -> Pairs:
    """Session lock on a connection out of SQLAlchemy's pool, for each lock."""
    import pals as library

    locker = library.Locker("bench", _for_sqlalchemy(dsn))
    del stack
    return _blocks(lambda: locker.lock("bench", blocking=False))


def postgresql_lock(dsn: str, _: str, stack: ExitStack) -> Pairs:
    """Session lock on one psycopg connection."""
    import psycopg
    from postgresql_lock import Lock

    connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
    return _blocks(lambda: Lock(connection, "bench"))


def redis_py(_: str, url: str, stack: ExitStack) -> Pairs:
    """Redis: a key with a time to live, which a job that takes longer outlives."""
    import redis

    client = stack.enter_context(redis.Redis.from_url(url))
    return _blocks(lambda: client.lock("bench", timeout=10))


def python_redis_lock(_: str, url: str, stack: ExitStack) -> Pairs:
    """Redis: a key with a time to live, and a signal to who waits."""
    import redis
    import redis_lock

    client = stack.enter_context(redis.Redis.from_url(url))
    return _blocks(lambda: redis_lock.Lock(client, "bench-signal", expire=10))


PEERS: dict[str, Callable[[str, str, ExitStack], Pairs]] = {
    "django-pglock": django_pglock,
    "django-pgware": django_pgware,
    "sqlalchemy-dlock": sqlalchemy_dlock,
    "pals": pals,
    "postgresql-lock": postgresql_lock,
    "redis-py Lock": redis_py,
    "python-redis-lock": python_redis_lock,
}


def _for_sqlalchemy(dsn: str) -> str:
    return dsn.replace("postgresql://", "postgresql+psycopg://", 1)
