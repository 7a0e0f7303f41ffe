"""The queue is the server's: first come, first served, and nobody asks while they wait."""

from __future__ import annotations

import subprocess
import sys

from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for

WAITERS = 8

WAITER = """
import sys
import psycopg
from concurrency_safe import configure, lock
configure(dsn=sys.argv[1], max_block=60)  # starting eight programs can take longer than the default
with lock("queue", timeout=None):
    print(sys.argv[2], flush=True)
    psycopg.connect(sys.argv[1], autocommit=True).execute("INSERT INTO entered (who) VALUES (%s)", [sys.argv[2]])
"""


def test_processes_enter_in_the_order_in_which_they_came() -> None:
    with PostgresServer(settings={"log_statement": "all"}) as server:
        store, rival = LockStore(server.dsn), Rival(server.dsn)
        rival.connection.execute("CREATE TABLE entered (place serial, who int)")
        rival.hold("queue")
        processes = []
        for number in range(WAITERS):
            command = [sys.executable, "-c", WAITER, server.dsn, str(number)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=bare_environment()))
            wait_for(lambda: store.waiting() == len(processes))

        before = server.log.read_text().count("pg_advisory_lock")
        for _ in range(100):  # the server's own clock: all the time that these take, the waiters are blocked
            rival.connection.execute("SELECT pg_sleep(0.02)")
        asked = server.log.read_text().count("pg_advisory_lock") - before

        rival.let_go()
        assert [process.wait() for process in processes] == [0] * WAITERS
        rows = rival.connection.execute("SELECT who FROM entered ORDER BY place").fetchall()

        assert [who for (who,) in rows] == list(range(WAITERS))
        assert before >= WAITERS
        assert asked == 0
        store.connection.close()
        rival.connection.close()
