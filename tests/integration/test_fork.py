"""Forked children: they own nothing of their parent's, and take nothing from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from concurrency_safe import LockAcquireTimeout, LockNotHeld, assert_locked, current_lock, lock, spaces
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for

RUNS = 50


def in_child(body: object) -> int:
    """Run `body()` in a forked child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()  # type: ignore[operator]
            status = 0
        except BaseException as error:  # noqa: BLE001 - it would go on as a second pytest
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


#: A process of little memory, whose children are quickly made: it holds a lock while they end, one after the other.
PARENT = """
import os, sys
from concurrency_safe import lock

def child(politely):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if politely:
        sys.exit(0)
    os._exit(0)

with lock("one") as held:
    for _ in range(int(sys.argv[1])):
        assert child(sys.argv[2] == "normal exit") == 0
        assert not held.is_lost
        print("held", flush=True)
        input()
"""


@pytest.mark.parametrize("end", ["_exit", "normal exit"])
def test_the_parents_lock_survives_its_childs_exit(end: str, dsn: str, rival: Rival) -> None:
    command = [sys.executable, "-c", PARENT, str(RUNS), end]
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdin
        assert parent.stdout
        for _ in range(RUNS):
            assert parent.stdout.readline() == "held\n"
            assert not rival.try_hold("one")
            parent.stdin.write("on\n")
            parent.stdin.flush()
    assert parent.returncode == 0
    assert rival.is_free("one")


def test_a_childs_files_are_its_own(rival: Rival) -> None:
    """They get the numbers that the parent's sockets had; closing the library's sessions must not touch them."""

    def child() -> None:
        pipes = [os.pipe() for _ in range(8)]
        spaces.close_idle_sessions()
        for reading, writing in pipes:
            os.write(writing, b"x")
            assert os.read(reading, 1) == b"x"

    with lock("one"), lock("two", scope="session"):
        assert not rival.try_hold("one")
    assert in_child(child) == 0
    with lock("one", timeout=0) as held:
        assert not held.is_lost


def test_a_child_owns_nothing() -> None:
    def child() -> None:
        assert current_lock() is None
        with pytest.raises(LockNotHeld):
            assert_locked("one")
        with pytest.raises(LockAcquireTimeout), lock("one", timeout=0):
            pytest.fail("two holders")
        with lock("another", timeout=0):
            assert_locked("another")

    with lock("one"):
        assert in_child(child) == 0


def test_a_child_that_leaves_the_block_releases_nothing(rival: Rival) -> None:
    held = lock("one").acquire()

    def child() -> None:
        with pytest.raises(LockNotHeld, match="another process"):
            held.release()

    assert in_child(child) == 0

    assert not held.is_lost
    assert not rival.try_hold("one")
    held.release()


def test_a_child_does_not_keep_its_parents_lock_alive(store: LockStore, rival: Rival) -> None:
    """An open copy of the socket would keep the session, after the parent's death."""
    ready, ready_write = os.pipe()
    stay, stay_write = os.pipe()
    parent = os.fork()
    if parent == 0:
        lock("orphan", timeout=0).acquire()
        if os.fork() == 0:
            os.close(stay_write)
            os.write(ready_write, b"x")
            os.read(stay, 1)
            os._exit(0)
        signal.pause()
    os.close(stay)
    os.read(ready, 1)
    assert not rival.try_hold("orphan")

    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: rival.is_free("orphan"), 1.0)

    os.close(stay_write)  # the grandchild reads the end of the file, and exits
    wait_for(lambda: store.rows() == 0)
