"""How long a lock takes from a holder to the next waiter, who goes next, and what a blocked waiter asks the server.

    python -m benchmarks.handoff [--waiters 1 8 64] [--seconds 3] [--markdown FILE]

Each waiter is a process with a session of its own. A hand-over is the time from just before a release to just after the
acquisition by the next one, by the clock that all processes share; where the same process got it again, nothing was
handed over, and the share of those is given. `raw` is psycopg with `pg_advisory_lock` and
`pg_advisory_unlock`, prepared. An inversion is a waiter that gets the lock before one that came earlier.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import redis

from concurrency_safe import configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer, ValkeyServer

KEY = "bench-handoff"

#: Takes the lock, and gives what releases it.
Acquire: TypeAlias = Callable[[], Callable[[], object]]

_fork = multiprocessing.get_context("fork")


def ours(address: str) -> Acquire:
    """Wait by `lock()`."""
    configure(dsn=address)
    return lambda: lock(KEY, timeout=None).acquire().release


def raw(address: str) -> Acquire:
    """Wait as briefly as psycopg can."""
    cursor = psycopg.connect(address, autocommit=True, prepare_threshold=0).cursor()
    number = [lock_key(KEY + "-raw").number]

    def acquire() -> Callable[[], object]:
        cursor.execute("SELECT pg_advisory_lock(%s)", number)
        return lambda: cursor.execute("SELECT pg_advisory_unlock(%s)", number)

    return acquire


def redis_lock(address: str) -> Acquire:
    """Wait by redis-py's lock, which asks again every 100 ms."""
    client = redis.Redis.from_url(address)

    def acquire() -> Callable[[], object]:
        held = client.lock(KEY, timeout=60)
        held.acquire()
        release: Callable[[], object] = held.release
        return release

    return acquire


@contextmanager
def crew(kind: Callable[[str], Acquire], address: str, size: int, work: Any) -> Iterator[list[Connection]]:
    """Start `size` processes that run `work`; give the pipes to them."""
    pipes, processes = [], []
    for _ in range(size):
        here, there = _fork.Pipe()
        process = _fork.Process(target=work, args=(kind, address, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    yield pipes
    for process in processes:
        process.join(30)


def contend(kind: Callable[[str], Acquire], address: str, pipe: Connection) -> None:
    """Take and release the lock until told to stop; report when."""
    acquire = kind(address)
    acquire()()
    pipe.send("ready")
    until = pipe.recv()
    seen = []
    while time.monotonic() < until:
        release = acquire()
        got = time.monotonic()
        seen.append((got, time.monotonic()))
        release()
    pipe.send(seen)


def queue_once(kind: Callable[[str], Acquire], address: str, pipe: Connection) -> None:
    """Take and release the lock once, when told to; report when it was there."""
    acquire = kind(address)
    pipe.send("ready")
    pipe.recv()
    release = acquire()
    got = time.monotonic()
    release()
    pipe.send(got)


def handovers(kind: Callable[[str], Acquire], address: str, waiters: int, seconds: float) -> tuple[list[float], float]:
    """Give the microseconds of each hand-over while `waiters` wait and one holds, and the share that were none."""
    seen: list[tuple[float, float, int]] = []
    with crew(kind, address, waiters + 1, contend) as pipes:
        for pipe in pipes:
            pipe.recv()
        until = time.monotonic() + seconds
        for pipe in pipes:
            pipe.send(until)
        for number, pipe in enumerate(pipes):
            seen += [(got, left, number) for got, left in pipe.recv()]
    seen.sort()
    most = seen[len(seen) // 10 : -len(seen) // 10]  # while all of them contend
    pairs = list(itertools.pairwise(most))
    across = [(later[0] - earlier[1]) * 1e6 for earlier, later in pairs if earlier[2] != later[2]]
    return across, 1 - len(across) / len(pairs)


def order(server: PostgresServer, waiters: int) -> tuple[int, int]:
    """Let `waiters` queue one after the other behind a holder; count the inversions, and the statements meanwhile."""
    configure(dsn=server.socket_dsn)
    watch = psycopg.connect(server.socket_dsn, autocommit=True).cursor()
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    begun = (
        "SELECT a.pid, a.query_start FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid "
        "WHERE l.locktype = 'advisory' AND NOT l.granted ORDER BY 1"
    )
    with crew(ours, server.socket_dsn, waiters, queue_once) as pipes:
        for pipe in pipes:
            pipe.recv()
        held = lock(KEY).acquire()
        for number, pipe in enumerate(pipes, 1):
            pipe.send("go")
            while watch.execute(waiting).fetchone() != (number,):
                pass
        before = watch.execute(begun).fetchall()
        watch.execute("SELECT pg_sleep(2)")
        asked = sum(one != other for one, other in zip(before, watch.execute(begun).fetchall(), strict=True))
        held.release()
        got = [pipe.recv() for pipe in pipes]
    return sum(later < earlier for earlier, later in itertools.pairwise(got)), asked


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    lines = ["| waiters | lock | median µs | p95 | p99 | of raw | kept by the same |", "|---|---|---|---|---|---|---|"]
    with PostgresServer() as server, ValkeyServer() as valkey:
        kinds = {"raw": (raw, server.socket_dsn), "lock()": (ours, server.socket_dsn)}
        kinds["redis-py Lock"] = (redis_lock, valkey.url)
        for waiters in options.waiters:
            seen: dict[str, list[float]] = {name: [] for name in kinds}
            ratios: dict[str, list[float]] = {name: [] for name in kinds}
            kept: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(options.rounds):  # interleaved
                medians = {}
                for name, (kind, address) in kinds.items():
                    these, same = handovers(kind, address, waiters, options.seconds)
                    seen[name] += these
                    kept[name].append(same)
                    medians[name] = statistics.median(these)
                for name, median in medians.items():
                    ratios[name].append(median / medians["raw"])
            for name, all_of_it in seen.items():
                cuts = statistics.quantiles(all_of_it, n=100)
                figures = (f"{value:.0f}" for value in (cuts[49], cuts[94], cuts[98]))
                ratio, same = statistics.median(ratios[name]), statistics.median(kept[name])
                lines.append(f"| {waiters} | {name} | {' | '.join(figures)} | {ratio:.2f} | {same:.0%} |")
        lines.append("")
        for waiters in options.waiters:
            inversions, asked = order(server, waiters)
            lines.append(f"{waiters} in a queue: {inversions} inversions; {asked} of them asked anything in 2 s.")
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
