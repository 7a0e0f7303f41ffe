"""How long a lock takes from a holder to the next waiter, who goes next, and what a waiter asks its server.

    python -m benchmarks.handoff [--most 64] [--milliseconds 1000] [--rounds 2] [--docs FOLDER]

Each waiter is a process with a session of its own. A hand-over is the time from just before a release to just after the
acquisition by the next one, by the clock that all processes share; where the same process got it again, nothing was
handed over, and the share of those is given. The ratio is to psycopg with `pg_advisory_lock` and `pg_advisory_unlock`,
prepared. An inversion is a pair of waiters of which the one that came later, by 50 ms or more, got the lock first. What
one waiter asks is counted from before it wants the lock until it has released it: PostgreSQL's statements by its log,
Redis' commands, without those that scripts call, by MONITOR.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks import figures, servers
from benchmarks.contestants import BLOCKING, LOCKS, OURS, Contestant, contestants, versions
from benchmarks.figures import Spread
from benchmarks.rivals import Place
from benchmarks.servers import listening
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: How many wait.
WAITERS = (1, 2, 4, 8, 16, 32, 64)

#: How many wait in a queue whose order is looked at: of each lock; and of ours.
QUEUE, OUR_QUEUES = 8, (2, 8, 16, 32, 64)

#: Seconds from one who comes to the queue to the next.
GAP = 0.05

#: Seconds that a waiter has to begin, and those for which it is watched after that while it is blocked.
BEGIN, WATCHED = 0.25, 1.0


def handovers(one: Contestant, waiters: int, seconds: float) -> tuple[list[float], float]:
    """Give the microseconds of each hand-over while `waiters` wait and one holds, and the share that were none."""
    seen = one.ask("crew", waiters, seconds)
    most = seen[len(seen) // 10 : -len(seen) // 10]  # while all of them contend
    pairs = list(itertools.pairwise(most))
    across = [(later[0] - earlier[1]) * 1e6 for earlier, later in pairs if earlier[2] != later[2]]
    return across, 1 - len(across) / len(pairs) if pairs else 0.0


def inversions(one: Contestant, waiters: int) -> int:
    """Let `waiters` queue one after the other behind a holder; count the pairs of which the later one was first."""
    one.ask("line_up", waiters + 1)
    one.ask("step", 0)
    one.ask("said", 0)
    for number in range(1, waiters + 1):
        one.ask("step", number)
        one.ask("step", number)  # to release it when it has it
        time.sleep(GAP)
    one.ask("step", 0)
    seen = sorted(one.ask("said", number) for number in range(1, waiters + 1))  # as they came
    for number in range(waiters + 1):
        one.ask("said", number)
        one.ask("step", number)
    return sum(earlier[1] > later[1] for earlier, later in itertools.combinations(seen, 2))


def orders(running: Iterable[Contestant], most: int, rounds: int) -> Iterator[str]:
    """Give the rows of a table: how many inversions a queue has."""
    for one in running:
        for size in OUR_QUEUES if one.name == OURS else (QUEUE,):
            if size <= most:
                found = [inversions(one, size) for _ in range(rounds)]
                yield f"{one.name} | {size} | {size * (size - 1) // 2} | {statistics.mean(found):.1f} | {max(found)}"


def asked(server: PostgresServer, valkey: ValkeyServer, one: Contestant) -> tuple[int, int]:
    """Count what a waiter asks in a whole wait, and in `WATCHED` seconds of it, while it is blocked."""
    with listening(server, valkey, one.name) as heard:
        one.ask("line_up", 2)
        heard()  # they have their sessions
        one.ask("step", 0)
        one.ask("said", 0)
        holder = heard()
        one.ask("step", 1)
        time.sleep(BEGIN)
        begun = heard()
        time.sleep(WATCHED)
        blocked = heard()
        one.ask("step", 1)  # to release it when it has it
        one.ask("step", 0)
        for number in (1, 1, 0):
            one.ask("said", number)
        ended = heard()
        one.ask("step", 0)
        one.ask("step", 1)

    def by_waiter(found: Counter[str]) -> int:
        return sum(count for session, count in found.items() if session not in holder)

    return by_waiter(begun + blocked + ended), by_waiter(blocked)


class Found(NamedTuple):
    """A contestant's hand-overs: microseconds and the ratio, where there were any, and the share that kept it."""

    spread: Spread | None
    ratio: float
    kept: float


def measure(running: dict[str, Contestant], waiters: int, rounds: int, seconds: float) -> dict[str, Found]:
    """Let all take turns."""
    seen: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    kept: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        medians = {}
        for name, one in running.items():
            these, same = handovers(one, waiters, seconds)
            seen[name] += these
            kept[name].append(same)
            medians[name] = statistics.median(these) if these else float("inf")
        for name, median in medians.items():
            ratios[name].append(median / medians[BLOCKING])
    return {
        name: Found(
            Spread.of(every) if len(every) > 1 else None, statistics.median(ratios[name]), statistics.median(kept[name])
        )
        for name, every in seen.items()
    }


def main() -> None:
    """Measure, and print the tables."""
    parser = figures.parser(__doc__, rounds=2, most=WAITERS[-1], milliseconds=1000)
    options = parser.parse_args()
    lines, picture = [], dict[str, dict[int, float]]()
    with PostgresServer() as server, ValkeyServer() as valkey:
        place = Place(server.socket_dsn, valkey.url)
        with contestants(LOCKS, place) as running:
            measured = [*servers.versions(server, valkey), *versions(running.values())]
            for waiters in (number for number in WAITERS if number <= options.most):
                rows = []
                found = measure(running, waiters, options.rounds, options.milliseconds / 1000)
                for name, (spread, ratio, kept) in found.items():
                    if spread is None:
                        rows.append(f"{name} | - | - | - | - | {kept:.0%}")
                    else:
                        picture.setdefault(name, {})[waiters] = spread.median
                        rows.append(f"{name} | {spread} | {ratio:.2f} | {kept:.0%}")
                head = f"{waiters} waiting | µs median | p95 | p99 | of {BLOCKING} | kept by the same"
                lines += figures.table(head, rows)
            rounds = max(3, options.rounds)
            head = f"waiting in a queue | waiters | pairs | inversions, mean of {rounds} queues | most"
            lines += figures.table(head, orders(running.values(), options.most, rounds))
            counts = []
            for name, one in running.items():
                whole, blocked = asked(server, valkey, one)
                counts.append(f"{name} | {whole} | {blocked}")
            head = "statements (Redis: commands) of one that waits"
            head += f" | in all, for a wait of {BEGIN + WATCHED:g} s | blocked, for {WATCHED:g} s"
            lines += figures.table(head, counts)
            lines += figures.not_installed([name for name in LOCKS if name not in running])
    if options.docs:
        figures.draw_lines(
            options.docs / "handoff.png", {"from a holder to the next": picture}, "waiting processes", "µs, median"
        )
    title, shown = "From a holder to the next", "a line for each lock"
    figures.publish("handoff", title, lines, options.docs, shown, measured)


if __name__ == "__main__":
    main()
