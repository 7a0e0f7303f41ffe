"""How many guarded tasks a worker does in a second, beside unguarded ones and other libraries' on the same stack.

    python -m benchmarks.celery_throughput [--tasks 1000] [--rounds 11] [--concurrency 2] [--docs FOLDER]

Each round sends the tasks of every kind to a queue that the worker does not know, and then lets it work; the kinds take
turns at being first. `send` is the client's speed, `run` the worker's from its first task on, `both` one after the
other. celery-once and celery-singleton take their lock when they send, so for them the last one counts. The ratios are
medians of those of each round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures, servers
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: Seconds until a worker must have answered, or a round must be over.
LIMIT = 120.0


class Round(NamedTuple):
    """Tasks a second that were sent, run, and both."""

    send: float
    run: float
    both: float


class Bench:
    """One worker, and the file that it marks."""

    def __init__(self, marks: Path, tasks: int) -> None:
        from benchmarks import celery_tasks

        self.app = celery_tasks.app
        self.kinds = celery_tasks.TASKS
        self.marks = marks
        self.tasks = tasks
        self.played = 0

    def play(self, task: Any, offset: int) -> Round:
        """Send tasks of one kind, each with a key of its own, to a queue of theirs; then let the worker do them."""
        self.played += 1
        queue = f"round-{self.played}"
        done = self.marks.stat().st_size + self.tasks
        began = time.perf_counter()
        for number in range(offset, offset + self.tasks):
            task.apply_async((number,), queue=queue)
        send = time.perf_counter() - began
        self.app.control.add_consumer(queue)
        wait_for(lambda: self.marks.stat().st_size > done - self.tasks)  # the worker has heard of the queue
        started = time.perf_counter()
        wait_for(lambda: self.marks.stat().st_size >= done)
        run = time.perf_counter() - started
        self.app.control.cancel_consumer(queue, reply=True)
        return Round(self.tasks / send, self.tasks / run, self.tasks / (send + run))


def wait_for(fact: Callable[[], object]) -> None:
    """Look until `fact()` is true."""
    until = time.monotonic() + LIMIT
    while not fact():
        if time.monotonic() > until:
            raise SystemExit(f"nothing happened for {LIMIT:g} s")
        time.sleep(0.002)


@contextmanager
def stack(concurrency: int) -> Iterator[tuple[Path, list[str]]]:
    """Start PostgreSQL, Valkey and a worker; give the file that the worker marks, and the servers' versions."""
    with PostgresServer() as postgres, ValkeyServer() as valkey, tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks")
        marks.touch()
        os.environ |= {
            "CONCURRENCY_SAFE_DSN": postgres.dsn,
            "CELERY_BROKER_URL": valkey.url,
            "BENCHMARK_MARKS": str(marks),
        }
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.celery_tasks", "worker"]
        command += ["-c", str(concurrency), "--loglevel", "WARNING", "--without-gossip", "--without-mingle"]
        worker = subprocess.Popen(command)
        try:
            yield marks, servers.versions(postgres, valkey)
        finally:
            worker.terminate()
            worker.wait()


def measure(tasks: int, rounds: int, concurrency: int) -> tuple[dict[str, list[Round]], list[str]]:
    """Play every kind in every round; give the results, and the versions of all that took part."""
    with stack(concurrency) as (marks, measured):
        bench = Bench(marks, tasks)
        wait_for(lambda: bench.app.control.ping(timeout=0.5))
        kinds = list(bench.kinds)
        results: dict[str, list[Round]] = {kind: [] for kind in kinds}
        for kind in kinds:  # connections are made, and modules read
            bench.play(bench.kinds[kind], -tasks)
        for number in range(rounds):
            first = number % len(kinds)
            for kind in kinds[first:] + kinds[:first]:
                results[kind].append(bench.play(bench.kinds[kind], number * tasks))
        names = [name for name in ("celery", "celery-once", "celery-singleton") if name == "celery" or name in kinds]
        return results, [*measured, *(f"{name} {version(name)}" for name in names)]


def report(results: dict[str, list[Round]], docs: Path | None, measured: list[str]) -> None:
    """Print the medians, and the ratios to the unguarded tasks' round by round."""
    rows, bars = [], {}
    for kind, mine in results.items():
        speeds = " | ".join(f"{statistics.median(each):.0f}" for each in zip(*mine, strict=True))
        pairs = list(zip(mine, results["unguarded"], strict=True))
        run, bars[kind] = (statistics.median(one[place] / plain[place] for one, plain in pairs) for place in (1, 2))
        rows.append(f"{kind} | {speeds} | {run:.2f} | {bars[kind]:.2f}")
    lines = figures.table("tasks a second | send | run | both | run, of unguarded | both, of unguarded", rows)
    if docs is not None:
        figures.draw_bars(docs / "celery_throughput.png", "of the unguarded tasks' speed", bars, ["concurrency-safe"])
    figures.publish("celery_throughput", "Celery's tasks", lines, docs, "a bar for each library", measured)


def main() -> None:
    """Measure, and print a table."""
    parser = figures.parser(__doc__, tasks=1000, rounds=11, concurrency=2)
    options = parser.parse_args()
    results, measured = measure(options.tasks, options.rounds, options.concurrency)
    report(results, options.docs, measured)


if __name__ == "__main__":
    main()
