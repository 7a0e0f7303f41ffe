"""What an uncontended lock costs, beside the same two statements by psycopg, and beside other libraries' locks.

    python -m benchmarks.uncontended [--rounds 30] [--pairs 300] [--held 1000] [--markdown FILE]

Medians of interleaved rounds, as ratios to a prepared try and unlock on one psycopg connection with autocommit, over
the same Unix socket (`tcp`: over TCP). Redis is Valkey, over TCP. Client and servers are bound to two processors, then
to one: left to the system, it is one or the other for a whole run, and a wake-up across processors is most of the time.
Then: the same lock while the process holds `--held` others, as a ratio to the same lock without them. Peers that are
not installed are left out (see `benchmarks.peers`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import django
import psycopg
from django.conf import settings

from benchmarks.peers import PEERS, Pairs
from concurrency_safe import concurrency_safe, configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.testing import PostgresServer, ValkeyServer

TRY, UNLOCK = "SELECT pg_try_advisory_lock(%s)", "SELECT pg_advisory_unlock(%s)"

YARDSTICK, YARDSTICK_TCP = "psycopg, prepared pair", "psycopg pair, tcp"


def psycopg_pair(dsn: str) -> Pairs:
    """Take and release one number, as briefly as psycopg can."""
    connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)
    cursor = connection.cursor()
    number = lock_key("bench").number

    def run(pairs: int) -> None:
        for _ in range(pairs):
            cursor.execute(TRY, [number]).fetchone()
            cursor.execute(UNLOCK, [number]).fetchone()

    return run


def libpq_pair(dsn: str) -> Pairs:
    """Do the same by libpq alone: what is left of it is the server, the socket and the client's C."""
    connection = psycopg.connect(dsn, autocommit=True)
    pgconn = connection.pgconn
    pgconn.prepare(b"try", TRY.replace("%s", "$1::bigint").encode())
    pgconn.prepare(b"unlock", UNLOCK.replace("%s", "$1::bigint").encode())
    number = [b"%d" % lock_key("bench-libpq").number]

    def run(pairs: int, _owner: object = connection) -> None:
        for _ in range(pairs):
            pgconn.exec_prepared(b"try", number)
            pgconn.exec_prepared(b"unlock", number)

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


def in_transaction(pairs: int) -> None:
    """Take a lock in a transaction of Django's, which is not a part of the time: a key after the other."""
    from django.db import transaction

    with transaction.atomic():
        for number in range(pairs):
            with lock(("bench", number)):
                pass
        transaction.set_rollback(True)


def rounds(contestants: dict[str, Pairs], number: int, pairs: int) -> Iterator[dict[str, float]]:
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


def bind(server: PostgresServer, valkey: ValkeyServer, processor: int) -> None:
    """Bind the servers to `processor`, and this process to the first one."""
    with psycopg.connect(server.socket_dsn) as connection:
        pids = [pid for (pid,) in connection.execute("SELECT pid FROM pg_stat_activity").fetchall()]
    for pid in (server.pid, valkey.pid, *pids):
        os.sched_setaffinity(pid, {processor})
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def beside_held(held: int, number: int, pairs: int) -> float:
    """Give what a lock costs while the process holds `held` others, as a ratio to what it costs without them."""
    configure(max_held=held + 1)
    ratios = []
    for _ in range(number):
        (alone,) = rounds({"alone": with_lock}, 1, pairs)
        others = [lock(("held", one)).acquire() for one in range(held)]
        (beside,) = rounds({"beside": with_lock}, 1, pairs)
        for one in others:
            one.release()
        ratios.append(beside["beside"] / alone["alone"])
    return statistics.median(ratios)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--held", type=int, default=1000)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    with PostgresServer() as server, ValkeyServer() as valkey, ExitStack() as stack:
        _use_django(server)
        configure(dsn=server.socket_dsn)
        contestants: dict[str, Pairs] = {
            YARDSTICK: psycopg_pair(server.socket_dsn),
            "libpq alone": libpq_pair(server.socket_dsn),
            "with lock(...)": with_lock,
            "@concurrency_safe": decorated,
            "async with lock(...)": async_with_lock,
            "in a transaction": in_transaction,
            YARDSTICK_TCP: psycopg_pair(server.dsn),
        }
        missing = []
        for name, peer in PEERS.items():
            try:
                contestants[name] = peer(server.socket_dsn, valkey.url, stack)
            except (ImportError, SyntaxError):  # the latter: written for a later Python
                missing.append(name)
        for contestant in contestants.values():
            contestant(options.pairs)  # so that it has its connections
        processors = sorted(os.sched_getaffinity(0))[:2]
        lines = []
        for processor in reversed(processors):
            bind(server, valkey, processor)
            where = "one processor" if processor == processors[0] else "two processors"
            lines += [f"| on {where} | µs | of the psycopg pair |", "|---|---|---|"]
            lines += _table(list(rounds(contestants, options.rounds, options.pairs)))
            lines.append("")
        ratio = beside_held(options.held, 5, options.pairs)
    lines.append(f"While the process holds {options.held} other locks: {ratio:.2f} of what it costs without them.")
    if missing:
        lines += ["", f"Not installed: {', '.join(missing)}."]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _use_django(server: PostgresServer) -> None:
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": "postgres", "USER": "postgres", "PORT": server.port}
    database["HOST"] = server.socket_dsn.partition("host=")[2].partition("&")[0].replace("%2F", "/")
    settings.configure(DATABASES={"default": database}, INSTALLED_APPS=[], USE_TZ=True)
    django.setup()


def _table(seen: list[dict[str, float]]) -> Iterator[str]:
    for name in seen[0]:
        median = statistics.median(each[name] for each in seen)
        ratio = statistics.median(each[name] / each[YARDSTICK] for each in seen)
        yield f"| {name} | {median:.0f} | {ratio:.2f} |"


if __name__ == "__main__":
    main()
