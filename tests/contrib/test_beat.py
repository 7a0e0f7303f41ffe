"""`run --wait beat -- celery beat` on three hosts: one beat at any time, whatever ends the leader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore, bare_environment, wait_for
from tests.integration.test_cli_run import PROGRAM, is_alive

BEAT = [sys.executable, "-m", "celery", "-q", "-A", "tests.contrib.beat_app", "beat", "--pidfile="]

#: Seconds from the end of a leader to the first tick of the next one.
SOON = 2.0

#: Ticks of one beat between the first and the last one of another.
OVERLAPS = """
SELECT count(*) FROM (SELECT pid, min(at) AS first, max(at) AS last FROM beats GROUP BY pid) a
  JOIN beats b ON b.pid <> a.pid AND b.at BETWEEN a.first AND a.last
"""


class Hosts:
    """Three hosts, each of which has a supervisor that starts the wrapper anew when it has ended."""

    def __init__(self, dsn: str, store: LockStore) -> None:
        self._store = store
        ours = {"CONCURRENCY_SAFE_DSN": dsn, "TICKS_DSN": store.dsn, "COVERAGE_PROCESS_CONFIG": ""}  # it starts slowly
        self._environment = {**bare_environment(), **ours}
        self.running: list[subprocess.Popen[bytes]] = []
        self.ended: list[int] = []

    def tend(self, wanted: int = 3) -> None:
        """Start what has ended, or is missing."""
        for process in list(self.running):
            if process.poll() is not None:
                self.running.remove(process)
                self.ended.append(process.returncode)
        while len(self.running) < wanted:
            command = [*PROGRAM, "--wait", "--grace=1", "beat", "--", *BEAT]
            self.running.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment)
            )

    def beats(self) -> list[int]:
        """Give the processes that have ticked, in that order."""
        rows = self._store.connection.execute("SELECT pid FROM beats GROUP BY pid ORDER BY min(at)").fetchall()
        return [int(pid) for (pid,) in rows]

    def ticks(self, pid: int) -> int:
        row = self._store.connection.execute("SELECT count(*) FROM beats WHERE pid = %s", [pid]).fetchone()
        assert row
        return int(row[0])

    def leader_of(self, beat: int) -> subprocess.Popen[bytes]:
        """Give the wrapper that has started the process `beat`."""
        with open(f"/proc/{beat}/stat") as stat:  # noqa: PTH123 - one line
            parent = int(stat.read().rpartition(")")[2].split()[1])
        return next(process for process in self.running if process.pid == parent)

    def close(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(10)
            finally:
                process.kill()
                process.wait()
        for beat in self.beats():
            if is_alive(beat):
                os.kill(beat, signal.SIGKILL)


@pytest.fixture
def start(store: LockStore) -> Iterator[Callable[[str], Hosts]]:
    """Start three hosts whose locks are in the database with this DSN."""
    store.connection.execute("CREATE TABLE beats (pid int, at timestamptz)")
    started: list[Hosts] = []

    def hosts(dsn: str) -> Hosts:
        started.append(Hosts(dsn, store))
        started[-1].tend()
        return started[-1]

    yield hosts
    for each in started:
        each.close()
    store.connection.execute("DROP TABLE beats")


def next_beat(hosts: Hosts, known: list[int]) -> int:
    """Wait until a process ticks that isn't among `known`; give it."""

    def ticks() -> bool:
        hosts.tend()
        return len(hosts.beats()) > len(known)

    wait_for(ticks, 30)
    (beat,) = [pid for pid in hosts.beats() if pid not in known]
    return beat


def overlaps(store: LockStore) -> int:
    row = store.connection.execute(OVERLAPS).fetchone()
    assert row
    return int(row[0])


@pytest.mark.slow
def test_one_beat_ticks_whatever_ends_the_leader(start: Callable[[str], Hosts], store: LockStore, dsn: str) -> None:
    hosts = start(dsn)
    first = next_beat(hosts, [])
    wait_for(lambda: store.waiting() == 2)

    standby = next(process for process in hosts.running if process is not hosts.leader_of(first))
    standby.terminate()
    assert standby.wait(10) == 143
    hosts.tend()
    wait_for(lambda: store.waiting() == 2)

    began = time.monotonic()
    hosts.leader_of(first).terminate()
    second = next_beat(hosts, [first])
    after_term = time.monotonic() - began
    wait_for(lambda: store.waiting() == 2)

    leader = hosts.leader_of(second)
    leader.kill()
    leader.wait()
    seen = hosts.ticks(second)
    wait_for(lambda: hosts.ticks(second) > seen + 5)  # its beat goes on, and so does its lock
    assert hosts.beats() == [first, second]
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    third = next_beat(hosts, [first, second])
    after_kill = time.monotonic() - began

    seen = hosts.ticks(third)
    wait_for(lambda: hosts.ticks(third) > seen + 5)
    assert hosts.beats() == [first, second, third]
    assert overlaps(store) == 0
    assert not is_alive(first)
    assert max(after_term, after_kill) < SOON, (after_term, after_kill)


@pytest.mark.slow
def test_after_a_restart_of_postgresql_one_beat_ticks_again(start: Callable[[str], Hosts], store: LockStore) -> None:
    with PostgresServer() as server:
        hosts = start(server.dsn)
        first = next_beat(hosts, [])
        server.restart("immediate")
        second = next_beat(hosts, [first])
        seen = hosts.ticks(second)
        wait_for(lambda: hosts.ticks(second) > seen + 10)
        assert hosts.beats() == [first, second]
        assert overlaps(store) == 0
        assert 76 in hosts.ended
        assert set(hosts.ended) <= {69, 76}
        hosts.close()
