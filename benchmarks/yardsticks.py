"""What is measured by, psycopg and libpq, and what is measured: the library's own locks."""

from __future__ import annotations

import asyncio
import functools
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.rivals import Lock, Pairs, Place

KEY = "bench"


class _Statements:
    """Takes and releases one number by two statements on one cursor."""

    __slots__ = ("_cursor", "_number")

    def __init__(self, cursor: Any, number: int) -> None:
        self._cursor = cursor
        self._number = [number]

    def __enter__(self) -> None:
        self._cursor.execute("SELECT pg_advisory_lock(%s)", self._number)

    def __exit__(self, *_: object) -> None:
        self._cursor.execute("SELECT pg_advisory_unlock(%s)", self._number)


def psycopg_lock(place: Place, stack: ExitStack) -> Lock:
    """Wait as briefly as psycopg can."""
    import psycopg

    connection = stack.enter_context(psycopg.connect(place.dsn, autocommit=True, prepare_threshold=0))
    cursor = connection.cursor()

    def statements(key: str) -> _Statements:
        return _Statements(cursor, zlib.crc32(key.encode()))

    return Lock(statements, statements)


def psycopg_pairs(place: Place) -> Pairs:
    """Take and release one number by a prepared try and unlock of psycopg's: what all ratios are to."""
    import psycopg

    cursor = psycopg.connect(place.dsn, autocommit=True, prepare_threshold=0).cursor()
    number = [zlib.crc32(KEY.encode())]

    def run(pairs: int) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            cursor.execute("SELECT pg_try_advisory_lock(%s)", number).fetchone()
            cursor.execute("SELECT pg_advisory_unlock(%s)", number).fetchone()
            taken.append(time.perf_counter_ns() - began)
        return taken

    return run


def libpq_pairs(place: Place) -> Pairs:
    """Do the same by libpq alone: what is left of it is the server, the socket and the client's C."""
    import psycopg

    connection = psycopg.connect(place.dsn, autocommit=True)
    pgconn = connection.pgconn
    pgconn.prepare(b"try", b"SELECT pg_try_advisory_lock($1::bigint)")
    pgconn.prepare(b"unlock", b"SELECT pg_advisory_unlock($1::bigint)")
    number = [b"%d" % zlib.crc32(KEY.encode())]

    def run(pairs: int, _owner: object = connection) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            pgconn.exec_prepared(b"try", number)
            pgconn.exec_prepared(b"unlock", number)
            taken.append(time.perf_counter_ns() - began)
        return taken

    return run


def ours(place: Place, stack: ExitStack) -> Lock:
    """`with lock(...)`."""
    from concurrency_safe import lock

    del place, stack  # Django's settings have it
    return Lock(lock, functools.partial(lock, timeout=None))


def _guarded() -> Callable[[], None]:
    from concurrency_safe import concurrency_safe

    @concurrency_safe(key=KEY)
    def guarded() -> None:
        """Do nothing, guarded."""

    return guarded


def decorated_pairs(place: Place) -> Pairs:
    """Call a guarded function."""
    guarded = _guarded()

    def run(pairs: int) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            guarded()
            taken.append(time.perf_counter_ns() - began)
        return taken

    return run


def alternating_pairs(place: Place) -> Pairs:
    """Take the lock by `with` and by a guarded function, in turn: what the one costs more is in the same moments."""
    from concurrency_safe import lock

    guarded = _guarded()

    def run(pairs: int) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            with lock(KEY):
                pass
            between = time.perf_counter_ns()
            guarded()
            taken += [between - began, time.perf_counter_ns() - between]
        return taken

    return run


def async_pairs(place: Place) -> Pairs:
    """`async with lock(...)`, in one event loop for all."""
    from concurrency_safe import lock

    async def run(pairs: int) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            async with lock(KEY):
                pass
            taken.append(time.perf_counter_ns() - began)
        return taken

    loop = asyncio.new_event_loop()
    return lambda pairs: loop.run_until_complete(run(pairs))


def transaction_pairs(place: Place) -> Pairs:
    """Take locks in a transaction of Django's, a key after the other; its begin and end are not a part of the time."""
    from django.db import transaction

    from concurrency_safe import lock

    def run(pairs: int) -> list[int]:
        taken = []
        with transaction.atomic():
            for number in range(pairs):
                began = time.perf_counter_ns()
                with lock((KEY, number)):
                    pass
                taken.append(time.perf_counter_ns() - began)
            transaction.set_rollback(True)
        return taken

    return run
