"""Real workers on real brokers under faults for a while, then the verdict.

    python -m benchmarks.chaos [--seed 1] [--seconds 300] [--report FOLDER]

Celery's workers are on RabbitMQ (`python -m tests.servers.fetch` brings it), Dramatiq's on Redis (Valkey): brokers on
which a killed worker loses no message. On Redis, Celery's transport takes a message by BRPOP and writes down afterwards
that it has it; whoever is killed in between takes it along, guarded or not.

The seed decides which faults there are, in which order, and how long after one another; what they hit, the workers'
own pace decides. The exit status is 1 when the judge found anything wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.chaos.faults import SESSIONS, Faults
from benchmarks.chaos.judge import Verdict, judge, read_runs
from benchmarks.chaos.relay import Relay
from benchmarks.chaos.report import markdown, picture
from concurrency_safe.postgres.sql import CREATE_FENCE
from concurrency_safe.testing import PostgresServer, ValkeyServer
from tests.servers.rabbitmq import RabbitMQServer

KEYS = tuple("abcdef")
#: Jobs that are on their way at a time, and seconds that the last of them may take.
OUTSTANDING, PATIENCE = 24, 120.0

#: Small, so that it can be filled. A commit is on disk when it is told: else a crash could let a token come twice.
SERVER = {"max_connections": "40", "max_locks_per_transaction": "20", "synchronous_commit": "on"}

CELERY = ["celery", "-A", "benchmarks.chaos.work:celery", "worker", "-c", "3", "--loglevel", "INFO"]
CELERY += ["--without-gossip", "--without-mingle"]
DRAMATIQ = ["dramatiq", "benchmarks.chaos.work", "--processes", "2", "--threads", "3", "--queues", "chaos"]

#: Locks that only ours can be: the faults' own end with their sessions.
LOCKS = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE locktype = 'advisory'"

#: What a worker's log says of tries that came while a fault lasted.
REFUSALS = {
    "tries that found the lock table full": "lock table is full",
    "tries that found no connection left": "too many clients already",
}


class Crew:
    """The workers; who dies is replaced."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        """Start two of Celery's and one of Dramatiq's."""
        self._environment = environment
        self.log = log
        self._log = log.open("ab")
        self._commands = [[*CELERY, "-n", f"one-{os.getpid()}"], [*CELERY, "-n", f"two-{os.getpid()}"], DRAMATIQ]
        self.replaced = 0
        #: Who had to be killed at the end.
        self.stuck = 0
        self.workers = [self._start(command) for command in self._commands]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """Give the pids of the workers' main processes."""
        return [worker.pid for worker in self.workers]

    def replace_dead(self) -> None:
        """Start anew who has ended; what it left behind is ended first."""
        for number, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self._end_session(worker, signal.SIGKILL)
                self.workers[number] = self._start(self._commands[number])
                self.replaced += 1

    def stop(self) -> None:
        """Let them end as they do at a deployment."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(60)
            except subprocess.TimeoutExpired:
                self.stuck += 1
                self._end_session(worker, signal.SIGKILL)
                worker.wait()
            self._end_session(worker, signal.SIGKILL)
        self._log.close()

    @staticmethod
    def _end_session(worker: subprocess.Popen[bytes], signum: int) -> None:
        try:
            os.killpg(worker.pid, signum)
        except ProcessLookupError:
            return


class Jobs:
    """The jobs, whose client sends again what its queue has failed."""

    def __init__(self, log: Path, seed: int) -> None:
        """Follow the runs in `log`."""
        from benchmarks.chaos import work

        self._send = {"celery": work.celery_job.delay, "dramatiq": work.dramatiq_job.send}
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._log = log.open()
        #: The beginning of a line, whose end was not there yet.
        self._begun = ""
        self._arguments: dict[int, tuple[str, tuple[int, str, float]]] = {}
        self._job_of: dict[str, int] = {}
        self._lost: set[str] = set()
        self.open: set[int] = set()
        #: The messages of each job.
        self.messages: dict[int, list[str]] = {}
        self.sent_again = 0

    @property
    def all(self) -> set[int]:
        """Every job there is."""
        return set(self._arguments)

    def feed(self) -> None:
        """Send new ones until enough are on their way."""
        while len(self.open) < OUTSTANDING:
            number = len(self._arguments)
            by = ("celery", "dramatiq")[number % 2]
            self._arguments[number] = (by, (number, self._chance.choice(KEYS), self._chance.uniform(0.05, 0.6)))
            self.open.add(number)
            self._dispatch(number)

    def _dispatch(self, number: int) -> None:
        by, arguments = self._arguments[number]
        sent = self._send[by](*arguments)
        self.messages.setdefault(number, []).append(sent.id if by == "celery" else sent.message_id)

    def look(self) -> None:
        """Read what has happened since the last look."""
        *lines, self._begun = (self._begun + self._log.read()).split("\n")
        for line in lines:
            fact: dict[str, Any] = json.loads(line)
            run = fact["run"]
            if fact["fact"] == "begin":
                self._job_of[run] = fact["job"]
            elif fact["fact"] == "end" and run not in self._lost:
                self.open.discard(self._job_of[run])
            elif fact["fact"] == "lost":
                self._lost.add(run)
                job = self._job_of[run]
                # Its task fails by LockLost; Dramatiq tries such a message again, Celery leaves it to the client.
                if self._arguments[job][0] == "celery":
                    self.open.add(job)
                    self.sent_again += 1
                    self._dispatch(job)


def play(seed: int, seconds: float, folder: Path) -> tuple[Verdict, dict[str, Any], str]:
    """Play one run; give the verdict, and what a report needs."""
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer(SERVER))
        valkey = stack.enter_context(ValkeyServer())
        relay = Relay(server.port)
        store = f"postgresql://postgres@127.0.0.1:{relay.port}/postgres?connect_timeout=3"
        rabbitmq = stack.enter_context(RabbitMQServer())
        log = folder / f"runs-{seed}.log"
        log.touch()
        os.environ |= {
            "CHAOS_STORE": store, "CHAOS_REDIS": valkey.url, "CHAOS_AMQP": rabbitmq.url, "CHAOS_LOG": str(log),
        }  # fmt: skip
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(CREATE_FENCE)
        crew = Crew(dict(os.environ), folder / f"workers-{seed}.log")
        try:
            faults = Faults(seed, server, relay, crew.pids, KEYS)
            jobs = Jobs(log, seed)
            started = time.monotonic()
            _let_it_run(jobs, crew, faults, seconds)
            finished = _let_it_end(jobs, crew)
            wrong = _rests(server, "locks", LOCKS, "though no job is under way")
        finally:
            crew.stop()
        wrong += _rests(server, "locks", LOCKS, "after the workers' end")
        wrong += _rests(server, "sessions", SESSIONS, "after the workers' end")
        if crew.stuck:
            wrong.append(f"{crew.stuck} workers did not end by themselves")
        if not finished:
            late = {number: jobs.messages[number] for number in sorted(jobs.open)}
            wrong.append(f"not done {PATIENCE:.0f} s after the last fault, with their messages: {late}")
        runs = read_runs(log, faults.done)
        verdict = judge(runs, faults.done, jobs.all)
        verdict.wrong += wrong
        verdict.figures |= {"workers that were replaced": crew.replaced, "jobs that were sent again": jobs.sent_again}
        told = crew.log.read_text(errors="replace")
        verdict.figures |= {what: told.count(words) for what, words in REFUSALS.items()}
    facts = {
        "seed": seed,
        "seconds": seconds,
        "figures": verdict.figures,
        "faults by name": dict(Counter(fault.name for fault in faults.done)),
        "wrong": verdict.wrong,
        "faults": [
            {**asdict(fault), "at": fault.at - started, "until": fault.until - started} for fault in faults.done
        ],
    }
    return verdict, facts, picture(runs, faults.done, KEYS, started)


def _let_it_run(jobs: Jobs, crew: Crew, faults: Faults, seconds: float) -> None:
    jobs.feed()
    until = time.monotonic() + PATIENCE
    while len(jobs.open) == OUTSTANDING and time.monotonic() < until:  # the first job shows that the workers are there
        jobs.look()
        time.sleep(0.05)
    until = time.monotonic() + seconds
    due = time.monotonic() + 1
    while time.monotonic() < until:
        jobs.look()
        jobs.feed()
        crew.replace_dead()
        if time.monotonic() >= due:
            due = time.monotonic() + faults.next()
        time.sleep(0.02)


def _let_it_end(jobs: Jobs, crew: Crew) -> bool:
    until = time.monotonic() + PATIENCE
    while jobs.open and time.monotonic() < until:
        jobs.look()
        crew.replace_dead()
        time.sleep(0.05)
    return not jobs.open


def _rests(server: PostgresServer, what: str, query: str, when: str) -> list[str]:
    """Say that some of what `query` counts are left, if they don't go away within seconds."""
    left: tuple[int] = (1,)
    until = time.monotonic() + 5
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        while left[0] and time.monotonic() < until:
            left = connection.execute(query).fetchone() or (0,)
    return [f"{left[0]} {what} are left {when}"] if left[0] else []


def _leave(signum: int, _: object) -> None:
    """End, with the workers; a second signal must not cut that short."""
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(128 + signum)


def main() -> int:
    """Give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--report", type=Path, default=Path("docs/chaos"), help="the folder of the reports")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    options.report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        verdict, facts, drawing = play(options.seed, options.seconds, Path(folder))
        if verdict.wrong:
            for log in Path(folder).glob("*.log"):
                shutil.copy(log, options.report)
    name = f"seed-{options.seed}"
    (options.report / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (options.report / f"{name}.svg").write_text(drawing, encoding="utf-8")
    text = markdown(facts, f"{name}.svg")
    (options.report / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
