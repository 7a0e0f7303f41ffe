"""Threads that may die before they begin, or begin late."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable

import pytest

from concurrency_safe import threads
from tests.integration.conftest import LIMIT


def test_a_thread_runs_under_its_name() -> None:
    names: list[str] = []
    over = threading.Event()

    def run() -> None:
        names.append(threading.current_thread().name)
        over.set()

    threads.start(run, "the thread")
    assert over.wait(LIMIT)
    assert names == ["the thread"]


def test_a_debugger_sees_it() -> None:
    seen = threading.Event()

    def trace(*_: object) -> None:
        seen.set()

    before = threading.gettrace()
    threading.settrace(trace)
    try:
        threads.start(int, "the thread")
    finally:
        threading.settrace(before)
    assert seen.wait(LIMIT)


def test_one_that_dies_at_birth_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython gives an asynchronous exception for a thread to the one that it is starting."""
    start, born, over = _thread.start_new_thread, list[int](), threading.Event()

    def start_or_die(run: Callable[[], None], args: tuple[()]) -> int:
        born.append(1)
        return start(run, args) if len(born) == threads.STARTS else start(int, ())

    monkeypatch.setattr(_thread, "start_new_thread", start_or_die)
    monkeypatch.setattr(threads, "START_LIMIT", 0.01)
    threads.start(over.set, "the thread")
    assert over.wait(LIMIT)


def test_of_those_that_begin_late_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[Callable[[], None]] = []
    ran: list[int] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda run, _: begins.append(run))
    monkeypatch.setattr(threads, "START_LIMIT", 0.01)
    with pytest.raises(RuntimeError, match="the thread 'the thread' does not start"):
        threads.start(lambda: ran.append(1), "the thread")

    name, before = threading.current_thread().name, sys.gettrace()
    for begin in begins:
        begin()
    threading.current_thread().name = name
    sys.settrace(before)
    assert len(begins) == threads.STARTS
    assert ran == [1]
