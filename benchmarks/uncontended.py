"""What an uncontended lock costs, beside the same two statements by psycopg: medians of interleaved rounds, as ratios.

    python -m benchmarks.uncontended [--rounds 30] [--pairs 300]

The yardstick is a prepared try and unlock on one psycopg connection with autocommit, over the same Unix socket.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator

import psycopg

from concurrency_safe import concurrency_safe, configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer

TRY, UNLOCK = "SELECT pg_try_advisory_lock(%s)", "SELECT pg_advisory_unlock(%s)"


def psycopg_pair(dsn: str) -> Callable[[int], None]:
    """Take and release one number, as briefly as psycopg can."""
    connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)
    cursor = connection.cursor()
    number = lock_key("bench").number

    def run(pairs: int) -> None:
        for _ in range(pairs):
            cursor.execute(TRY, [number]).fetchone()
            cursor.execute(UNLOCK, [number]).fetchone()

    return run


def with_lock(pairs: int) -> None:
    """Run an empty block under a lock."""
    for _ in range(pairs):
        with lock("bench"):
            pass


@concurrency_safe(key="bench")
def guarded() -> None:
    """Do nothing, guarded."""


def decorated(pairs: int) -> None:
    """Call a guarded function."""
    for _ in range(pairs):
        guarded()


def async_with_lock(pairs: int) -> None:
    """Run an empty block under a lock, in an event loop; its start is a small part of it."""

    async def run() -> None:
        for _ in range(pairs):
            async with lock("bench"):
                pass

    asyncio.run(run())


def rounds(contestants: dict[str, Callable[[int], None]], number: int, pairs: int) -> Iterator[dict[str, float]]:
    """Give the microseconds a pair of each contestant, a round at a time."""
    for contestant in contestants.values():
        contestant(pairs)
    for _ in range(number):
        seen = {}
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant(pairs)
            seen[name] = (time.perf_counter() - started) / pairs * 1e6
        yield seen


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=300)
    options = parser.parse_args()
    with PostgresServer() as server:
        configure(dsn=server.socket_dsn)
        yardstick = "psycopg, prepared pair"
        contestants = {
            yardstick: psycopg_pair(server.socket_dsn),
            "with lock(...)": with_lock,
            "@concurrency_safe": decorated,
            "async with lock(...)": async_with_lock,
        }
        seen = list(rounds(contestants, options.rounds, options.pairs))
    print(f"{'':24}{'us':>8}{'ratio':>8}")
    for name in contestants:
        median = statistics.median(each[name] for each in seen)
        ratio = statistics.median(each[name] / each[yardstick] for each in seen)
        print(f"{name:24}{median:8.1f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
