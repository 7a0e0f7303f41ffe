"""How many locks a process takes in a second, with 1 to 64 threads, on one key and on many; and how many connections.

    python -m benchmarks.throughput [--milliseconds 300] [--rounds 6] [--docs FOLDER]

Each contestant is a process, and they take turns; it is bound to one processor and the servers to another. The ratio is
the median of those of each round, to psycopg with a connection for each thread, `pg_advisory_lock` and
`pg_advisory_unlock`, prepared. The times are those of a lock from before it is wanted until it is released, so most of
them are for waiting where threads are more than keys; who waits at the end of a turn has little to wait for any more,
so a lock that lets some wait for very long would do so for longer. Each contestant has a database of its own, by which
its connections are counted. Then: what a lock that nobody else wants costs while up to 10 000 others are held by the
same process (on the same connection, but for ours); the ratio is to the same without others in the same round.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import psycopg

from benchmarks import figures, servers
from benchmarks.contestants import BLOCKING, CONTESTANTS, LOCKS, OURS, Contestant, contestants, versions
from benchmarks.figures import Spread
from benchmarks.rivals import Place
from benchmarks.servers import bind
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: One thread goes from key to key as on a single one, so it is measured on that alone.
THREADS, KEYS = (4, 16, 64), (1, 64)
ALONE = (1, 1)

#: Who holds others beside, and how many.
HOLDERS = (BLOCKING, OURS, "django-pglock", "postgresql-lock")
HELD = (0, 1, 10, 100, 1000, 10_000)

#: Locks taken for one figure of those.
PAIRS = 200

#: Room for 10 000 locks.
SERVER = {"max_locks_per_transaction": "256"}

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s"


class Turn(NamedTuple):
    """Locks a second; the microseconds of each; and the connections to PostgreSQL that were used for them."""

    rate: float
    taken: list[float]
    connections: int


class Found(NamedTuple):
    """Of all turns: locks a second, the ratio to the yardstick, microseconds, and connections."""

    rate: float
    ratio: float
    spread: Spread
    connections: int


def places(server: PostgresServer, valkey: ValkeyServer) -> dict[str, Place]:
    """Give each contestant a database, named by its number."""
    found = {}
    for number, name in enumerate(LOCKS):
        server.create_database(f"bench{number}")
        found[name] = Place(server.socket_dsn.replace("/postgres?", f"/bench{number}?"), valkey.url)
    return found


def turn(one: Contestant, threads: int, keys: int, seconds: float, watch: psycopg.Cursor[Any]) -> Turn:
    """Let the contestant's `threads` take locks for so long."""
    rate, taken = one.ask("threads", threads, keys, seconds)
    used = connections(one, watch)
    one.ask("leave")
    return Turn(rate, [each / 1000 for each in taken], used)


def connections(one: Contestant, watch: psycopg.Cursor[Any]) -> int:
    """Count those that a contestant has to its database."""
    (count,) = watch.execute(CONNECTIONS, [f"bench{LOCKS.index(one.name)}"]).fetchone() or (0,)
    return int(count)


def measure(
    running: Mapping[str, Contestant], threads: int, keys: int, rounds: int, seconds: float, watch: psycopg.Cursor[Any]
) -> dict[str, Found]:
    """Let all take turns."""
    seen = [{name: turn(one, threads, keys, seconds, watch) for name, one in running.items()} for _ in range(rounds)]
    return {
        name: Found(
            statistics.median(each[name].rate for each in seen),
            statistics.median(each[name].rate / each[BLOCKING].rate for each in seen),
            Spread.of(itertools.chain(*(each[name].taken for each in seen))),
            max(each[name].connections for each in seen),
        )
        for name in running
    }


def rows(threads: int, found: Mapping[str, Found]) -> Iterator[str]:
    """Give the rows of a table."""
    for name, each in found.items():
        used = "-" if CONTESTANTS[name].redis else each.connections
        yield f"{threads} | {name} | {each.rate:.0f} | {each.ratio:.2f} | {each.spread} | {used}"


def beside(running: Iterable[Contestant], rounds: int, watch: psycopg.Cursor[Any]) -> Iterator[str]:
    """Give the rows of a table: what a lock costs while others are held."""
    seen: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for _, one in itertools.product(range(rounds), running):
        without = 0.0
        for held in HELD:
            one.ask("hold_others", held)
            cost = statistics.median(one.pairs(PAIRS)) / 1000
            without = without or cost
            seen.setdefault((one.name, held), []).append((cost, cost / without, connections(one, watch)))
        one.ask("hold_others", 0)
    for (name, held), each in sorted(seen.items(), key=lambda item: HELD.index(item[0][1])):
        cost, ratio = statistics.median(one[0] for one in each), statistics.median(one[1] for one in each)
        used = min(one[2] for one in each)  # some stay for a while after others are held
        yield f"{held} | {name} | {cost:.0f} | {ratio:.2f} | {used}"


def main() -> None:
    """Measure, and print the tables."""
    parser = figures.parser(__doc__, rounds=6, milliseconds=300)
    options = parser.parse_args()
    first, second = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    where = first, second
    seconds = options.milliseconds / 1000
    found: dict[tuple[int, int], dict[str, Found]] = {}
    with PostgresServer(SERVER) as server, ValkeyServer() as valkey:
        watch = psycopg.connect(server.socket_dsn, autocommit=True).cursor()
        databases = places(server, valkey)
        with contestants(LOCKS, databases) as running:
            missing = [name for name in LOCKS if name not in running]
            measured = [*servers.versions(server, valkey), *versions(running.values())]
            bind(running.values(), (server, valkey), where)
            for threads, keys in [ALONE, *itertools.product(THREADS, KEYS)]:  # some keep the connections they had
                found[threads, keys] = measure(running, threads, keys, options.rounds, seconds, watch)
        with contestants(HOLDERS, databases) as running:
            bind(running.values(), (server, valkey), where)
            held = list(beside(running.values(), options.rounds, watch))
    head = f"lock | locks a second | of {BLOCKING} | µs median | p95 | p99 | connections"
    lines = figures.table(f"one thread | {head}", rows(1, found[ALONE]))
    for keys in KEYS:
        these = (row for threads in THREADS for row in rows(threads, found[threads, keys]))
        lines += figures.table(f"threads, {keys} key{'s' * (keys > 1)} | {head}", these)
    lines += figures.table("locks held beside | lock | µs a lock | of its own without | connections", held)
    lines += figures.not_installed(missing)
    if options.docs:
        panels = {
            f"{keys} key{'s' * (keys > 1)}": {
                name: {1: alone.rate} | {threads: found[threads, keys][name].rate for threads in THREADS}
                for name, alone in found[ALONE].items()
            }
            for keys in KEYS
        }
        figures.draw_lines(options.docs / "throughput.png", panels, "threads", "locks a second")
    figures.publish("throughput", "Locks a second", lines, options.docs, "locks a second over threads", measured)


if __name__ == "__main__":
    main()
