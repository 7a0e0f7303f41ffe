"""What a guard costs a Dramatiq worker: messages a second, unguarded, guarded, and under ConcurrentRateLimiter.

    python -m benchmarks.dramatiq_throughput [--messages 2000] [--rounds 5]

Real servers and one real worker (2 processes, 4 threads each), a body that does nothing, a key for each message. The
kinds take turns, so that a machine that gets slower does so for all; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.rate_limits.backends import RedisBackend

from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware
from concurrency_safe.testing import PostgresServer, ValkeyServer

KINDS = ("unguarded", "guarded", "limited")

if "BENCHMARK_BROKER" in os.environ:
    broker: Any = RedisBroker(url=os.environ["BENCHMARK_BROKER"])  # type: ignore[no-untyped-call]
    broker.add_middleware(ConcurrencySafeMiddleware())
    dramatiq.set_broker(broker)
    limits = RedisBackend(client=broker.client)

    @dramatiq.actor(queue_name="unguarded")
    def unguarded(number: int) -> None:
        """Do nothing."""

    @dramatiq.actor(queue_name="guarded", lock_key="benchmark:{number}")
    def guarded(number: int) -> None:
        """Do nothing, under a lock."""

    @dramatiq.actor(queue_name="limited")
    def limited(number: int) -> None:
        """Do nothing, under Dramatiq's own mutex."""
        with ConcurrentRateLimiter(limits, f"benchmark:{number}").acquire():  # type: ignore[no-untyped-call]
            pass


def main() -> None:
    """Measure, and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with PostgresServer() as postgres, ValkeyServer() as valkey:
        environment = {**os.environ, "BENCHMARK_BROKER": valkey.url, "DATABASE_URL": postgres.dsn}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        sender: Any = RedisBroker(url=valkey.url)  # type: ignore[no-untyped-call]
        command = [sys.executable, "-m", "dramatiq", "benchmarks.dramatiq_throughput", "--processes", "2"]
        command += ["--threads", "4"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as worker:
            try:
                for number in range(options.rounds + 1):
                    for kind in KINDS:
                        rate = _round(sender, kind, options.messages)
                        if number:  # the first warms up
                            rates[kind].append(rate)
            finally:
                worker.send_signal(signal.SIGTERM)
    _report(rates)


def _round(sender: RedisBroker, kind: str, messages: int) -> float:
    """Send a batch, and give the messages a second until it is done."""
    began = time.monotonic()
    for number in range(messages):
        sender.enqueue(dramatiq.Message(queue_name=kind, actor_name=kind, args=(number,), kwargs={}, options={}))
    while sender.do_qsize(kind):
        time.sleep(0.005)
    return messages / (time.monotonic() - began)


def _report(rates: dict[str, list[float]]) -> None:
    base = statistics.median(rates["unguarded"])
    print(f"{'':12} messages/s   of unguarded   lowest   highest")
    for kind, each in rates.items():
        median = statistics.median(each)
        print(f"{kind:12} {median:10.0f} {median / base:13.2f} {min(each):10.0f} {max(each):9.0f}")


if __name__ == "__main__":
    main()
