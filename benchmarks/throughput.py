"""How many locks a process takes in a second: with 1 to 64 threads, on one key and on many; and with many held.

    python -m benchmarks.throughput [--seconds 1] [--rounds 3] [--markdown FILE] [--plot FILE]

`raw` is psycopg with a connection for each thread, `pg_advisory_lock` and `pg_advisory_unlock`, prepared. The
connections that each kind used are counted while it runs. Then: what a lock costs while the process holds others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import psycopg
import redis

from concurrency_safe import configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.spaces import close_idle_sessions
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: Makes what a thread calls to take and release the lock of a number, once.
Kind: TypeAlias = Callable[[], Callable[[int], None]]

THREADS, KEYS = (1, 4, 16, 64), (1, 64)
HELD = (0, 100, 1000, 10_000)


def ours() -> Callable[[int], None]:
    """Take a lock of the library."""

    def once(number: int) -> None:
        with lock(("bench", number), timeout=None):
            pass

    return once


def raw(dsn: str) -> Kind:
    """Take it by psycopg."""

    def make() -> Callable[[int], None]:
        cursor = psycopg.connect(dsn, autocommit=True, prepare_threshold=0, application_name="raw").cursor()

        def once(number: int) -> None:
            key = [lock_key(("raw", number)).number]
            cursor.execute("SELECT pg_advisory_lock(%s)", key)
            cursor.execute("SELECT pg_advisory_unlock(%s)", key)

        return once

    return make


def redis_lock(url: str) -> Kind:
    """Take redis-py's."""
    client = redis.Redis.from_url(url)

    def make() -> Callable[[int], None]:
        def once(number: int) -> None:
            with client.lock(f"bench:{number}", timeout=60):
                pass

        return once

    return make


class Rate(NamedTuple):
    """Locks a second, and the most connections to PostgreSQL that they used."""

    locks: float
    connections: int


def rate(kind: Kind, threads: int, keys: int, seconds: float, watch: psycopg.Cursor[Any]) -> Rate:
    """Let `threads` take locks for so long, each the next key after its last one."""
    done = [0] * threads
    ready = threading.Barrier(threads + 1)
    over = threading.Event()

    def work(number: int) -> None:
        once = kind()
        once(number % keys)
        ready.wait()
        for turn in itertools.count():
            if over.is_set():
                return
            once((number + turn) % keys)
            done[number] += 1

    crew = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for one in crew:
        one.start()
    ready.wait()
    started = time.monotonic()
    used = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cs:%' OR application_name = 'raw'"
    connections = (watch.execute(used).fetchone() or (0,))[0]
    over.wait(seconds)
    over.set()
    elapsed = time.monotonic() - started
    for one in crew:
        one.join()
    return Rate(sum(done) / elapsed, connections)


def beside(held: int, pairs: int = 300) -> float:
    """Give the microseconds of a lock while the process holds `held` others."""
    once = ours()
    others = [lock(("held", number)).acquire() for number in range(held)]
    once(0)
    started = time.perf_counter()
    for _ in range(pairs):
        once(0)
    cost = (time.perf_counter() - started) / pairs * 1e6
    for one in others:
        one.release()
    return cost


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG; needs matplotlib)")
    options = parser.parse_args()
    settings = {"max_locks_per_transaction": "256"}
    with PostgresServer(settings) as server, ValkeyServer() as valkey:
        configure(dsn=server.socket_dsn, max_held=max(HELD) + 1)
        watch = psycopg.connect(server.socket_dsn, autocommit=True).cursor()
        kinds: dict[str, Kind] = {
            "lock()": ours,
            "raw": raw(server.socket_dsn),
            "redis-py Lock": redis_lock(valkey.url),
        }
        seen: dict[tuple[int, int, str], list[Rate]] = {}
        for keys, threads, _ in itertools.product(KEYS, THREADS, range(options.rounds)):
            for name, kind in kinds.items():
                these = rate(kind, threads, keys, options.seconds, watch)
                seen.setdefault((keys, threads, name), []).append(these)
                close_idle_sessions()
        costs = {held: statistics.median(beside(held) for _ in range(options.rounds)) for held in HELD}
    median = {place: statistics.median(each.locks for each in rates) for place, rates in seen.items()}
    lines = ["| keys | threads | lock | locks a second | of raw | connections |", "|---|---|---|---|---|---|"]
    for (keys, threads, name), rates in seen.items():
        per_second = median[keys, threads, name]
        ratio = per_second / median[keys, threads, "raw"]
        connections = "-" if name.startswith("redis") else max(each.connections for each in rates)
        lines.append(f"| {keys} | {threads} | {name} | {per_second:.0f} | {ratio:.2f} | {connections} |")
    lines += ["", "| locks held beside | µs a lock | of none |", "|---|---|---|"]
    lines += [f"| {held} | {cost:.0f} | {cost / costs[0]:.2f} |" for held, cost in costs.items()]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.plot:
        plot(median, list(kinds), options.plot)


def plot(median: dict[tuple[int, int, str], float], kinds: list[str], path: Path) -> None:
    """Draw locks a second over threads, a panel for each number of keys."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]  # not among the development tools

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    figure, panels = plt.subplots(1, len(KEYS), figsize=(11, 4), sharey=True)
    for panel, keys in zip(panels, KEYS, strict=True):
        for name in kinds:
            panel.plot(THREADS, [median[keys, threads, name] for threads in THREADS], marker="o", label=name)
        panel.set(title=f"{keys} key{'s' * (keys > 1)}", xlabel="threads", xscale="log", yscale="log")
        panel.set_xticks(THREADS, [str(threads) for threads in THREADS])
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("locks a second")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
