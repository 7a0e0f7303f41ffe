"""What a guard costs a Dramatiq worker: messages a second, unguarded, guarded, and under ConcurrentRateLimiter.

    python -m benchmarks.dramatiq_throughput [--messages 2000] [--rounds 11] [--docs FOLDER]

Real servers and a real worker for each kind (2 processes, 4 threads each), of which one runs at a time; only the
guarded one has our middleware. A body that does nothing, a key for each message. The workers are stopped (SIGSTOP)
while a batch is sent; the kinds take turns at being first, and the ratio is the median of those of each round.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.rate_limits.backends import RedisBackend

from benchmarks import figures, servers
from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware
from concurrency_safe.testing import PostgresServer, ValkeyServer

KINDS = ("unguarded", "guarded", "limited")

if "BENCHMARK_BROKER" in os.environ:
    broker: Any = RedisBroker(url=os.environ["BENCHMARK_BROKER"])  # type: ignore[no-untyped-call]
    dramatiq.set_broker(broker)
    limits = RedisBackend(client=broker.client)

    @dramatiq.actor(queue_name="unguarded")
    def unguarded(number: int) -> None:
        """Do nothing."""

    if os.environ["BENCHMARK_KIND"] == "guarded":
        broker.add_middleware(ConcurrencySafeMiddleware())

        @dramatiq.actor(queue_name="guarded", lock_key="benchmark:{number}")
        def guarded(number: int) -> None:
            """Do nothing, under a lock."""

    @dramatiq.actor(queue_name="limited")
    def limited(number: int) -> None:
        """Do nothing, under Dramatiq's own mutex."""
        with ConcurrentRateLimiter(limits, f"benchmark:{number}").acquire():  # type: ignore[no-untyped-call]
            pass


def main() -> None:
    """Measure, and print a table."""
    options = figures.parser(__doc__, messages=2000, rounds=11).parse_args()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with PostgresServer() as postgres, ValkeyServer() as valkey:
        environment = {**os.environ, "BENCHMARK_BROKER": valkey.url, "DATABASE_URL": postgres.dsn}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        sender: Any = RedisBroker(url=valkey.url)  # type: ignore[no-untyped-call]
        measured = [*servers.versions(postgres, valkey), f"dramatiq {version('dramatiq')}"]
        workers: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for kind in KINDS:
                workers[kind] = start(kind, environment)
                play(sender, kind, options.messages, workers[kind].pid)  # it has started, and has its connections
            for number in range(options.rounds):
                first = number % len(KINDS)
                for kind in KINDS[first:] + KINDS[:first]:
                    rates[kind].append(play(sender, kind, options.messages, workers[kind].pid))
        finally:
            for worker in workers.values():
                os.killpg(worker.pid, signal.SIGCONT)
                worker.terminate()
                worker.wait()
    rows, bars = [], {}
    for kind, mine in rates.items():
        bars[kind] = statistics.median(one / plain for one, plain in zip(mine, rates["unguarded"], strict=True))
        rows.append(f"{kind} | {statistics.median(mine):.0f} | {min(mine):.0f} | {max(mine):.0f} | {bars[kind]:.2f}")
    lines = figures.table("messages a second | median | lowest | highest | of unguarded", rows)
    if options.docs:
        what = "of the unguarded messages' speed"
        figures.draw_bars(options.docs / "dramatiq_throughput.png", what, bars, ["guarded"])
    figures.publish("dramatiq_throughput", "Dramatiq's messages", lines, options.docs, "a bar for each kind", measured)


def start(kind: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the worker of `kind`, in a session of its own."""
    command = [sys.executable, "-m", "dramatiq", "benchmarks.dramatiq_throughput", "--queues", kind]
    command += ["--processes", "2", "--threads", "4"]
    environment = {**environment, "BENCHMARK_KIND": kind}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def play(sender: Any, kind: str, messages: int, worker: int) -> float:
    """Send a batch while the workers are stopped; give the messages a second that `worker` does after that."""
    os.killpg(worker, signal.SIGSTOP)
    for number in range(messages):
        sender.enqueue(dramatiq.Message(queue_name=kind, actor_name=kind, args=(number,), kwargs={}, options={}))
    began = time.monotonic()
    os.killpg(worker, signal.SIGCONT)
    while sender.do_qsize(kind):
        time.sleep(0.002)
    rate = messages / (time.monotonic() - began)
    os.killpg(worker, signal.SIGSTOP)
    return rate


if __name__ == "__main__":
    main()
