"""Threads of our own, which may be started at any moment: by a finalizer, say, or under asynchronous exceptions."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable

#: Seconds in which a new thread must be there, and how often it is started.
START_LIMIT, STARTS = 1.0, 3


def start(run: Callable[[], object], name: str) -> None:
    """Run `run()` in a new thread, and see it begin; nobody waits for its end, nor does the end of the process.

    Not by `threading`: its `start` takes a lock, which the running thread may hold already when a finalizer comes, and
    waits for ever for a thread that dies at birth: an asynchronous exception for the starter goes to the thread that it
    starts, which bears its number for a moment (`_PyThreadState_Prealloc`).

    Raises: RuntimeError: there is room for no more threads, or the interpreter ends, or none of `STARTS` began in time.
    """
    tickets = [run]  # for one, whoever else begins late
    begun = threading.Lock()
    begun.acquire()

    def begin() -> None:  # pragma: no cover - nobody traces here yet
        sys.settrace(threading.gettrace())  # for debuggers and coverage, as `threading` would
        _begin(tickets, begun, name)

    for _ in range(STARTS):
        _thread.start_new_thread(begin, ())
        if begun.acquire(timeout=START_LIMIT):
            return
    raise RuntimeError(f"the thread {name!r} does not start")


def _begin(tickets: list[Callable[[], object]], begun: threading.Lock, name: str) -> None:
    try:
        run = tickets.pop()
    except IndexError:
        return
    begun.release()
    threading.current_thread().name = name
    run()
