"""The process of test_interrupts whose threads are interrupted; it prints how long each interrupt took to surface.

A process of its own, without coverage: that slows threads which throw and catch all the time by a factor of twenty.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import threading
import time

from concurrency_safe import configure, lock
from tests.integration.conftest import LIMIT, Rival
from tests.integration.test_interrupts import ROUNDS, Interrupt, grants, throw

stop = threading.Event()
ready: queue.SimpleQueue[None] = queue.SimpleQueue()
caught: queue.SimpleQueue[float] = queue.SimpleQueue()


def work(key: str) -> None:
    """Take the lock again and again, whatever comes."""
    while not stop.is_set():
        try:
            ready.put(None)
            while not stop.is_set():
                with lock(key, timeout=None):
                    pass
        except Interrupt:
            caught.put(time.monotonic())


def main(dsn: str) -> None:
    """Interrupt two threads for each of two keys: one waits in the server, or comes from there, one in the process."""
    configure(dsn=dsn)
    with lock("warm"):  # the watcher is there: an interrupt at the birth of a thread is lost by Python
        pass
    chance = random.Random(13)
    late: list[float] = []
    granting = [grants(Rival(dsn), stop, key) for key in ("one", "two")]
    workers = [threading.Thread(target=work, args=[key]) for key in ("one", "one", "two", "two")]
    for worker in workers:
        worker.start()
    try:
        for _ in range(ROUNDS):
            for _ in workers:
                ready.get(timeout=LIMIT)
            stop.wait(chance.uniform(0.0001, 0.008))
            thrown = time.monotonic()
            assert [throw(worker, Interrupt) for worker in workers] == [1] * 4
            late += [caught.get(timeout=LIMIT) - thrown for _ in workers]
    finally:
        stop.set()
        for thread in (*workers, *granting):
            thread.join()
    sys.stdout.write(json.dumps(late) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # until the test has looked


if __name__ == "__main__":
    main(sys.argv[1])
