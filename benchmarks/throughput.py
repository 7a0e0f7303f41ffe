"""How many locks a process takes in a second, with 1 to 64 threads, on one key and on many; and how many connections.

    python -m benchmarks.throughput [--milliseconds 600] [--rounds 2] [--docs FOLDER]

Each contestant's process is started anew for each measurement, and they take turns. The ratio is to psycopg with a
connection for each thread. Then: what a lock costs while the process holds up to 10 000 others.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, NamedTuple

import psycopg

from benchmarks import figures
from benchmarks.contestants import CONTESTANTS, LOCKS, OURS, YARDSTICK, Contestant
from benchmarks.rivals import Place
from concurrency_safe.testing import PostgresServer, ValkeyServer

THREADS, KEYS = (1, 4, 16, 64), (1, 4, 16, 64)
HELD = (0, 1, 10, 100, 1000, 10_000)

#: Room for 10 000 locks.
SERVER = {"max_locks_per_transaction": "256"}

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"


class Rate(NamedTuple):
    """Locks a second, and the connections to PostgreSQL that were used for them."""

    locks: float
    connections: int


def rate(name: str, place: Place, threads: int, keys: int, seconds: float, watch: psycopg.Cursor[Any]) -> Rate | None:
    """Let the contestant's `threads` take locks for so long; None: it can't be had."""
    before = (watch.execute(CONNECTIONS).fetchone() or (0,))[0]
    one = Contestant(name, place)
    if not one.is_there:
        return None
    one.tell("threads", threads, keys, seconds)
    time.sleep(seconds / 2)
    used = (watch.execute(CONNECTIONS).fetchone() or (0,))[0] - before
    locks: float = one.hear()
    one.close()
    while (watch.execute(CONNECTIONS).fetchone() or (0,))[0] > before:
        pass  # the server takes a moment to notice
    return Rate(locks, used)


def beside(place: Place, rounds: int) -> dict[int, float]:
    """Give the microseconds of a lock while its process holds others."""
    one = Contestant(OURS, place)
    found: dict[int, list[float]] = {held: [] for held in HELD}
    for _, held in itertools.product(range(rounds), HELD):
        one.ask("hold_others", held)
        found[held].append(statistics.median(one.pairs(200)) / 1000)
    one.close()
    return {held: statistics.median(costs) for held, costs in found.items()}


def main() -> None:
    """Measure, and print the tables."""
    parser = figures.parser(__doc__, rounds=2, milliseconds=600)
    options = parser.parse_args()
    seen: dict[tuple[int, int, str], list[Rate]] = {}
    with PostgresServer(SERVER) as server, ValkeyServer() as valkey:
        place = Place(server.socket_dsn, valkey.url)
        watch = psycopg.connect(server.socket_dsn, autocommit=True).cursor()
        for keys, threads, _ in itertools.product(KEYS, THREADS, range(options.rounds)):
            for name in LOCKS:
                found = rate(name, place, threads, keys, options.milliseconds / 1000, watch)
                if found is not None:
                    seen.setdefault((keys, threads, name), []).append(found)
        costs = beside(place, max(3, options.rounds))
    median = {where: statistics.median(each.locks for each in rates) for where, rates in seen.items()}
    lines = []
    for keys in KEYS:
        rows = []
        for (there, threads, name), rates in seen.items():
            if there == keys:
                locks = median[keys, threads, name]
                used = "-" if CONTESTANTS[name].redis else max(each.connections for each in rates)
                ratio = locks / median[keys, threads, YARDSTICK]
                rows.append(f"{threads} | {name} | {locks:.0f} | {ratio:.2f} | {used}")
        head = f"threads, {keys} key{'s' * (keys > 1)} | lock | locks a second | of psycopg's | connections"
        lines += figures.table(head, rows)
    held = (f"{number} | {cost:.0f} | {cost / costs[0]:.2f}" for number, cost in costs.items())
    lines += figures.table("locks held beside | µs a lock | of none", held)
    if options.docs:
        panels = {
            f"{keys} key{'s' * (keys > 1)}": {
                name: {n: median[keys, n, name] for n in THREADS if (keys, n, name) in median} for name in LOCKS
            }
            for keys in (KEYS[0], KEYS[-1])
        }
        figures.draw_lines(options.docs / "throughput.png", panels, "threads", "locks a second")
    figures.publish("throughput", "Locks a second", lines, options.docs, "locks a second over threads")


if __name__ == "__main__":
    main()
