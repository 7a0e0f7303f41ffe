"""Greenlets: while one takes locks without rest, the others have their turns."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.conftest import LIMIT, LockStore, bare_environment

SCRIPT = """
from gevent import monkey

monkey.patch_all()

import sys
import time

import gevent

from concurrency_safe import configure, lock
from concurrency_safe.postgres.waiting import TURN

configure(dsn=sys.argv[1])
in_this_turn = most = 0
is_over = False


def look():
    global in_this_turn
    while True:
        in_this_turn = 0
        gevent.sleep(0)


def be_busy():  # in a thread, which runs whenever a statement is sent: every answer is there by the first look
    while not is_over:
        sum(range(2000))


with lock("warm"):
    pass
gevent.spawn(look)
gevent.get_hub().threadpool.spawn(be_busy)
for _ in range(60):
    with lock("one"):
        until = time.monotonic() + TURN / 2
        while time.monotonic() < until:
            pass
    in_this_turn += 1
    most = max(most, in_this_turn)
is_over = True
print(most)
"""


def test_a_greenlet_that_takes_locks_without_rest_leaves_turns_to_others(store: LockStore) -> None:
    command = [sys.executable, "-c", SCRIPT, store.dsn]
    done = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, check=True, timeout=LIMIT)
    assert int(done.stdout) <= 3
