"""What a lock costs that nobody else wants, beside the same two statements by psycopg, and other libraries' locks.

    python -m benchmarks.uncontended [--rounds 20] [--pairs 200] [--starts 5] [--docs FOLDER]

Each contestant is a process (ours share one), and they take turns; the ratios are medians of those of each turn, to a
prepared try and unlock on one psycopg connection with autocommit. PostgreSQL is asked over its Unix socket (one table:
over TCP), Valkey always over TCP. The client is bound to one processor and the server to another; then both to one;
then, in several starts of all processes, to none: a wake-up across processors is most of the time where the client
sleeps, and left to the system it is one or the other for long. A transaction's begin and end are not a part of a lock's
time. Then: what the decorator costs beside `with`, and how many statements a lock takes, by the server's log.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping

from benchmarks import figures, servers
from benchmarks.contestants import (
    ALTERNATING,
    ASYNC,
    CONTESTANTS,
    DECORATED,
    OURS,
    TRANSACTION,
    YARDSTICK,
    Contestant,
    contestants,
    versions,
)
from benchmarks.figures import Spread
from benchmarks.rivals import Place
from benchmarks.servers import bind, bind_processes, family, listening
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: The nanoseconds of each pair, by contestant and turn.
Samples = dict[str, list[list[int]]]

MINE = (OURS, DECORATED, ASYNC, TRANSACTION)
NAMES = [name for name in CONTESTANTS if name != ALTERNATING]


def turns(running: Mapping[str, Contestant], rounds: int, pairs: int) -> Samples:
    """Let each of `running` take its turn, `rounds` times."""
    for one in running.values():
        one.pairs(pairs)  # connections are made, statements prepared
    seen: Samples = {name: [] for name in running}
    for _ in range(rounds):
        for name, one in running.items():
            seen[name].append(one.pairs(pairs))
    return seen


def ratios(seen: Samples, to: str = YARDSTICK) -> dict[str, float]:
    """Give the median of each contestant's ratios, turn by turn."""
    base = [statistics.median(each) for each in seen[to]]
    return {
        name: statistics.median(statistics.median(each) / one for each, one in zip(every, base, strict=True))
        for name, every in seen.items()
    }


def rows(seen: Samples) -> Iterable[str]:
    """Give the rows of a table: microseconds, and the ratio."""
    found = ratios(seen)
    for name, every in seen.items():
        spread = Spread.of([taken / 1000 for each in every for taken in each])
        yield f"{name} | {spread} | {found[name]:.2f}"


def merged(parts: list[Samples]) -> Samples:
    """Give all the turns of `parts` as one."""
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


def decorators_part(alternating: Contestant, rounds: int, pairs: int) -> float:
    """Give the microseconds that the decorator costs more than `with`: of medians, from pairs in turn."""
    found = []
    for _ in range(rounds):
        taken = alternating.pairs(pairs)
        found.append(statistics.median(taken[1::2]) - statistics.median(taken[::2]))
    return statistics.median(found) / 1000


def statements(
    server: PostgresServer, valkey: ValkeyServer, running: Mapping[str, Contestant], pairs: int
) -> Iterable[str]:
    """Give the rows of a table: what a pair of each contestant asks its server."""
    for name, one in running.items():
        with listening(server, valkey, name) as heard:
            one.pairs(1)
            heard()
            one.pairs(pairs)
            yield f"{name} | {sum(heard().values()) / pairs:.1f}"


def main() -> None:
    """Measure, and print the tables."""
    parser = figures.parser(__doc__, rounds=20, pairs=200, starts=5)
    options = parser.parse_args()
    first, second = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    head = "µs median | p95 | p99 | of the psycopg pair"
    with PostgresServer() as server, ValkeyServer() as valkey:
        place, both = Place(server.socket_dsn, valkey.url), (server, valkey)
        lines, found, more = [], {}, {}
        with contestants([*NAMES, ALTERNATING], place) as running:
            missing = [name for name in NAMES if name not in running]
            alternating = running.pop(ALTERNATING)
            turns(running, 0, options.pairs)  # so that the servers have all their processes
            for title, where in (("two processors", (first, second)), ("one processor", (first, first))):
                bind(running.values(), both, where)
                seen = turns(running, options.rounds, options.pairs)
                found[title] = ratios(seen)
                lines += figures.table(f"bound to {title} | {head}", rows(seen))
                more[title] = decorators_part(alternating, options.rounds, options.pairs)
            bind(running.values(), both, (first, second))
            counts = list(statements(server, valkey, running, 20))
            measured = [*servers.versions(server, valkey), *versions(running.values())]
        bind_processes(family(both), {first, second})
        unbound = []
        for _ in range(options.starts):
            with contestants(NAMES, place) as running:
                unbound.append(turns(running, max(2, options.rounds // 4), options.pairs))
        seen = merged(unbound)
        lines += figures.table(f"unbound, {options.starts} starts | {head}", rows(seen))
        with contestants(NAMES, Place(server.dsn, valkey.url)) as running:
            bind(running.values(), both, (first, second))
            lines += figures.table(
                f"over TCP, two processors | {head}", rows(turns(running, options.rounds, options.pairs))
            )
    lines += figures.table(
        "bound to | µs that the decorator takes beside `with`", (f"{n} | {m:.1f}" for n, m in more.items())
    )
    lines += figures.table("lock | statements (Redis: commands)", counts)
    lines += figures.not_installed(missing)
    if options.docs:
        what = "of psycopg's prepared try and unlock, client and server on two processors"
        figures.draw_bars(options.docs / "uncontended.png", what, found["two processors"], MINE)
    figures.publish(
        "uncontended", "A lock that nobody else wants", lines, options.docs, "a bar for each lock", measured
    )


if __name__ == "__main__":
    main()
