"""A wait that times out as the lock is granted: the answer says no, the session holds it all the same."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from concurrency_safe import LockAcquireTimeout, lock
from tests.integration.conftest import LockStore, Rival

SECONDS = 5.0

#: Another process that does the same: its threads and ours meet in the server.
PEER = """
import sys
from tests.integration.test_ghosts import contend
import concurrency_safe
concurrency_safe.configure(dsn=sys.argv[1])
contend()
"""


def contend() -> list[int]:
    """Let 4 threads hold a key for 2 ms each, waiting for at most 2 ms; count holds and conflicts."""
    counts = [0, 0]

    def work() -> None:
        until = time.monotonic() + SECONDS
        pause = threading.Event()
        while time.monotonic() < until:
            try:
                with lock("ghost", timeout=0.002):
                    counts[0] += 1
                    pause.wait(0.002)
            except LockAcquireTimeout:
                counts[1] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def test_waits_that_time_out_at_the_grant_leave_nothing(dsn: str, store: LockStore, rival: Rival) -> None:
    peers = [subprocess.Popen([sys.executable, "-c", PEER, dsn]) for _ in range(2)]

    holds, conflicts = contend()

    assert [peer.wait() for peer in peers] == [0, 0]
    assert holds > 100
    assert conflicts > 100
    assert store.waiting() == 0
    assert store.rows() == 0
    assert rival.is_free("ghost")
