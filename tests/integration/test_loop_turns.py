"""Where many run by turns (tasks, greenlets), those that take locks without rest leave others theirs."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.conftest import LIMIT, LockStore, bare_environment

GREENLETS = """
from gevent import monkey

monkey.patch_all()

import sys
import time

import gevent

from concurrency_safe import configure, lock
from concurrency_safe.core.steps import TURN

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


def work(number):
    global in_this_turn, most
    for _ in range(60):
        with lock(f"key {number}"):
            until = time.monotonic() + TURN / 2
            while time.monotonic() < until:
                pass
        in_this_turn += 1
        most = max(most, in_this_turn)


work(0)
gevent.joinall([gevent.spawn(work, number) for number in range(2)], raise_error=True)
is_over = True
print(most)
"""

#: On one processor with the server, which answers in the turn that a look gives it: so every answer is there.
TASKS = """
import asyncio
import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from concurrency_safe import configure, lock
from concurrency_safe.testing import PostgresServer


async def most_in_a_turn(tasks):
    in_this_turn, seen = 0, []

    async def look():
        nonlocal in_this_turn
        while True:
            seen.append(in_this_turn)
            in_this_turn = 0
            await asyncio.sleep(0)

    async def work(number):
        nonlocal in_this_turn
        for _ in range(10_000 // tasks):
            async with lock(f"key {number}"):
                in_this_turn += 1

    looking = asyncio.create_task(look())
    await asyncio.gather(*map(work, range(tasks)))
    looking.cancel()
    return max(seen)


with PostgresServer() as server:
    configure(dsn=server.socket_dsn)
    asyncio.run(most_in_a_turn(1))
    print(asyncio.run(most_in_a_turn(10)) / asyncio.run(most_in_a_turn(1)))
"""


def run(script: str, *arguments: object) -> float:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=bare_environment(), capture_output=True, text=True, check=True, timeout=LIMIT)
    return float(done.stdout)


def test_a_greenlet_that_takes_locks_without_rest_leaves_turns_to_others(store: LockStore) -> None:
    assert run(GREENLETS, store.dsn) <= 5


def test_a_turn_is_for_all_tasks_together() -> None:
    """Not for each of them: ten take no more locks in one than a single task does, but for the one that each is at."""
    assert run(TASKS) < 3
