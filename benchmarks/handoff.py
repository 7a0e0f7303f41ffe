"""How long a lock takes from a holder to the next waiter, who goes next, and what a blocked waiter asks its server.

    python -m benchmarks.handoff [--most 64] [--milliseconds 1000] [--rounds 2] [--docs FOLDER]

Each waiter is a process with a session of its own. A hand-over is the time from just before a release to just after the
acquisition by the next one, by the clock that all processes share; where the same process got it again, nothing was
handed over, and the share of those is given. The ratio is to psycopg with `pg_advisory_lock` and `pg_advisory_unlock`,
prepared. An inversion is a waiter that gets the lock before one that came earlier.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import psycopg
import redis

from benchmarks import figures
from benchmarks.contestants import LOCKS, OURS, YARDSTICK, Contestant, contestants
from benchmarks.figures import Spread
from benchmarks.rivals import Place
from benchmarks.uncontended import asked, logged_statements
from concurrency_safe import configure, lock
from concurrency_safe.testing import PostgresServer, ValkeyServer

KEY = "bench-handoff"

#: How many wait. All that are measured do so at 8; at the others, the ones that come near, and who asks again.
WAITERS = (1, 2, 4, 8, 16, 32, 64)

#: Seconds for which a waiter is watched.
WATCHED = 2.0

_fork = multiprocessing.get_context("fork")


def handovers(one: Contestant, waiters: int, seconds: float) -> tuple[list[float], float]:
    """Give the microseconds of each hand-over while `waiters` wait and one holds, and the share that were none."""
    seen = one.ask("crew", waiters, seconds)
    most = seen[len(seen) // 10 : -len(seen) // 10]  # while all of them contend
    pairs = list(itertools.pairwise(most))
    across = [(later[0] - earlier[1]) * 1e6 for earlier, later in pairs if earlier[2] != later[2]]
    return across, 1 - len(across) / len(pairs) if pairs else 0.0


@contextmanager
def queue(address: str, size: int) -> Iterator[list[Connection]]:
    """Start `size` processes that take our lock once, when told to; give the pipes to them."""
    pipes, processes = [], []
    for _ in range(size):
        here, there = _fork.Pipe()
        process = _fork.Process(target=queue_once, args=(address, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    yield pipes
    for process in processes:
        process.join(30)


def queue_once(address: str, pipe: Connection) -> None:
    """Take and release the lock once, when told to; report when it was there."""
    configure(dsn=address)
    with lock("elsewhere"):
        pipe.send("ready")
    pipe.recv()
    with lock(KEY, timeout=None):
        got = time.monotonic()
    pipe.send(got)


def inversions(server: PostgresServer, waiters: int) -> int:
    """Let `waiters` queue one after the other behind a holder; count those that were overtaken."""
    configure(dsn=server.socket_dsn)
    watch = psycopg.connect(server.socket_dsn, autocommit=True).cursor()
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with queue(server.socket_dsn, waiters) as pipes:
        for pipe in pipes:
            pipe.recv()
        held = lock(KEY).acquire()
        for number, pipe in enumerate(pipes, 1):
            pipe.send("go")
            while watch.execute(waiting).fetchone() != (number,):
                pass
        held.release()
        got = [pipe.recv() for pipe in pipes]
    return sum(later < earlier for earlier, later in itertools.pairwise(got))


def asked_while_blocked(server: PostgresServer, valkey: ValkeyServer, one: Contestant) -> int:
    """Count what a blocked waiter asks in `WATCHED` seconds."""
    client = redis.Redis.from_url(valkey.url)
    one.ask("block")
    time.sleep(1)  # it has begun to wait
    before = asked(server, client, one.name)
    time.sleep(WATCHED)
    count = asked(server, client, one.name) - before - int(one.name.startswith(("redis", "python-redis")))
    one.ask("let_go")
    return count


def measure(
    running: dict[str, Contestant], waiters: int, rounds: int, seconds: float
) -> Iterable[tuple[str, Spread, float, float]]:
    """Give each contestant's hand-overs: microseconds, the ratio, and the share that kept it."""
    seen: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    kept: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):  # they take turns
        medians = {}
        for name, one in running.items():
            these, same = handovers(one, waiters, seconds)
            seen[name] += these
            kept[name].append(same)
            medians[name] = statistics.median(these) if these else float("inf")
        for name, median in medians.items():
            ratios[name].append(median / medians[YARDSTICK])
    for name, every in seen.items():
        if len(every) > 1:
            yield name, Spread.of(every), statistics.median(ratios[name]), statistics.median(kept[name])


def main() -> None:
    """Measure, and print the tables."""
    parser = figures.parser(__doc__, rounds=2, most=WAITERS[-1], milliseconds=1000)
    options = parser.parse_args()
    lines, picture = [], dict[str, dict[int, float]]()
    with PostgresServer() as server, ValkeyServer() as valkey:
        place = Place(server.socket_dsn, valkey.url)
        with contestants(LOCKS, place) as running:
            for waiters in (number for number in WAITERS if number <= options.most):
                rows = []
                for name, spread, ratio, kept in measure(running, waiters, options.rounds, options.milliseconds / 1000):
                    picture.setdefault(name, {})[waiters] = spread.median
                    rows.append(f"{name} | {spread} | {ratio:.2f} | {kept:.0%}")
                head = f"{waiters} waiting | µs median | p95 | p99 | of psycopg's blocking | kept by the same"
                lines += figures.table(head, rows)
            with logged_statements(server):
                counts = [f"{name} | {asked_while_blocked(server, valkey, one)}" for name, one in running.items()]
        lines += figures.table(f"one that waits | statements in {WATCHED:g} s (Redis: commands)", counts)
        orders = [f"{number} | {inversions(server, number)}" for number in (8, options.most)]
        lines += figures.table(f"`{OURS}`, waiting in a queue | overtaken", orders)
    if options.docs:
        figures.draw_lines(
            options.docs / "handoff.png", {"from a holder to the next": picture}, "waiting processes", "µs, median"
        )
    figures.publish("handoff", "From a holder to the next", lines, options.docs, "a line for each lock")


if __name__ == "__main__":
    main()
