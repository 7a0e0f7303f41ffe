"""Threads of our own, which may be started at any moment: by a finalizer, say, or under asynchronous exceptions."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable


def start(run: Callable[[], object], name: str) -> None:
    """Run `run()` in a new thread; nobody waits for it, nor does the end of the process.

    Not by `threading`: its `start` takes a lock, which the running thread may hold already when a finalizer comes, and
    waits for ever for a thread that dies at birth: an asynchronous exception for the starter goes to the thread that it
    starts, which bears its number for a moment (`_PyThreadState_Prealloc`).

    Raises: RuntimeError: there is room for no more threads, or the interpreter ends.
    """

    def begin() -> None:  # pragma: no cover - nobody traces here yet
        sys.settrace(threading.gettrace())  # for debuggers and coverage, as `threading` would
        _begin(run, name)

    _thread.start_new_thread(begin, ())


def _begin(run: Callable[[], object], name: str) -> None:
    threading.current_thread().name = name
    run()
