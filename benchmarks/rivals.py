"""Other libraries' locks, as they are used. Those that are not installed are left out (see `contestants`)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, TypeAlias


class Place(NamedTuple):
    """Where the servers are."""

    dsn: str
    redis: str


class Lock(NamedTuple):
    """How a library takes the lock of a key.

    `brief`: the way that costs least where nobody else wants it; `patient`: waits for as long as it takes.
    """

    brief: Callable[[str], AbstractContextManager[object]]
    patient: Callable[[str], AbstractContextManager[object]]


#: Makes what takes the lock, for the thread that calls it; the stack closes what it opened.
Make: TypeAlias = Callable[[Place, ExitStack], Lock]

#: Takes and releases a lock that nobody else wants so many times, and gives the nanoseconds of each.
Pairs: TypeAlias = Callable[[int], list[int]]


def predecessor(place: Place, stack: ExitStack) -> Lock:
    """Session lock on Django's connection; who waits with a timeout, as by default, asks every 50 ms."""
    from django.db import connection

    from concurrency_safe import lock

    del place  # the settings have it
    stack.callback(connection.close)
    return Lock(lock, lambda key: lock(key, timeout=600))


def django_pglock(place: Place, stack: ExitStack) -> Lock:
    """Session lock on Django's connection."""
    import pglock
    from django.db import connection

    del place  # the settings have it
    stack.callback(connection.close)
    return Lock(lambda key: pglock.advisory(key, timeout=0), pglock.advisory)


def django_pglock_transaction(place: Place) -> Pairs:
    """Locks until the end of a transaction of Django's, a key after the other."""
    import pglock
    from django.db import transaction

    del place  # the settings have it

    def run(pairs: int) -> list[int]:
        taken = []
        with transaction.atomic():
            for number in range(pairs):
                began = time.perf_counter_ns()
                pglock.advisory(f"bench:{number}", xact=True).acquire()
                taken.append(time.perf_counter_ns() - began)
            transaction.set_rollback(True)
        return taken

    return run


def django_pgware(place: Place, stack: ExitStack) -> Lock:
    """Session lock on Django's connection, by what django-pglocks has become."""
    from django.db import connection
    from django_pg_utils.locks import advisory_lock

    del place  # the settings have it
    stack.callback(connection.close)
    return Lock(lambda key: advisory_lock(key, wait=False), advisory_lock)


def sqlalchemy_dlock(place: Place, stack: ExitStack) -> Lock:
    """Session lock on one SQLAlchemy connection."""
    import sqlalchemy
    from sqlalchemy_dlock import create_sadlock

    engine = sqlalchemy.create_engine(_for_sqlalchemy(place.dsn))
    stack.callback(engine.dispose)
    connection = stack.enter_context(engine.connect())
    one = functools.partial(create_sadlock, connection)
    return Lock(one, one)


def pals(place: Place, stack: ExitStack) -> Lock:
    """Session lock on a connection out of SQLAlchemy's pool, for each lock."""
    locker = _pals_locker(place, os.getpid())
    del stack
    # Without a timeout of its own it waits for 30 s.
    return Lock(lambda key: locker.lock(key, blocking=False), lambda key: locker.lock(key, acquire_timeout=600_000))


@functools.cache
def _pals_locker(place: Place, pid: int) -> Any:
    import pals as library
    import sqlalchemy

    del pid  # a forked child has its own
    engine = functools.partial(sqlalchemy.create_engine, _for_sqlalchemy(place.dsn), pool_size=70)
    return library.Locker("bench", create_engine_callable=engine)


def postgresql_lock(place: Place, stack: ExitStack) -> Lock:
    """Session lock on one psycopg connection."""
    import psycopg
    from postgresql_lock import Lock as Theirs

    connection = stack.enter_context(psycopg.connect(place.dsn, autocommit=True))
    one = functools.partial(Theirs, connection)
    return Lock(one, one)


def redis_py(place: Place, stack: ExitStack) -> Lock:
    """Redis: a key with a time to live, which a job that takes longer outlives; who waits asks every 100 ms."""
    import redis

    client = stack.enter_context(redis.Redis.from_url(place.redis))
    one = functools.partial(client.lock, timeout=60)
    return Lock(one, one)


def python_redis_lock(place: Place, stack: ExitStack) -> Lock:
    """Redis: a key with a time to live, and a signal to who waits."""
    import redis
    import redis_lock

    client = stack.enter_context(redis.Redis.from_url(place.redis))
    one = functools.partial(redis_lock.Lock, client, expire=60)
    return Lock(lambda key: one(f"signal-{key}"), lambda key: one(f"signal-{key}"))


def _for_sqlalchemy(dsn: str) -> str:
    return dsn.replace("postgresql://", "postgresql+psycopg://", 1)
