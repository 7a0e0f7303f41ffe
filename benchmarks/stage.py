"""The process of a contestant: it does what the lines of its standard input say, and answers each by a line.

    python -m benchmarks.stage NAME PLACE

A line is a JSON list: a command of `COMMANDS`, and its arguments.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks import yardsticks
from benchmarks.contestants import ABSENT, CONTESTANTS, LIBRARIES, PYTHON
from benchmarks.rivals import Lock, Make, Pairs, Place
from benchmarks.yardsticks import KEY

#: Seconds until threads that do not come are a failure.
LIMIT = 120.0

_fork = multiprocessing.get_context("fork")


class Stage:
    """What can be asked of a contestant."""

    def __init__(self, name: str, place: Place, stack: ExitStack) -> None:
        """Make it ready. Raises: ImportError, SyntaxError: it can't be had here."""
        entry = CONTESTANTS[name]
        if entry.django:
            use_django(place.dsn)
        self._place = place
        self._pairs: dict[str, Pairs] = {}
        self._make = entry.make
        self._stack = stack
        for each, one in CONTESTANTS.items():
            if one.pairs is not None and name in (each, one.beside):
                self._pairs[each] = one.pairs(place)
        if entry.make is not None:
            with ExitStack() as trial:  # it is found missing now, or never
                entry.make(place, trial).brief(KEY)
        self.versions = {name: version(name) for name in entry.libraries} | {PYTHON: platform.python_version()}
        self._others: list[Any] = []
        self._pipes: list[Any] = []
        self._crew: list[threading.Thread] = []
        self._leave = threading.Event()

    @property
    def make(self) -> Make:
        """What takes its lock."""
        assert self._make is not None  # noqa: S101 - the benchmark asks `LOCKS` alone
        return self._make

    @cached_property
    def lock(self) -> Lock:
        """How this thread takes its locks, one beside another."""
        return self.make(self._place, self._stack)

    def pairs(self, name: str, pairs: int) -> list[int]:
        """Take and release the lock, which nobody else wants; give the nanoseconds of each."""
        if name not in self._pairs:
            self._pairs[name] = _sampled(self.lock)
        return self._pairs[name](pairs)

    def hold_others(self, held: int) -> int:
        """Hold so many other locks, in place of as many as it held before."""
        if self.make is yardsticks.ours:
            from concurrency_safe import configure

            configure(max_held=held + 100)
        while len(self._others) > held:
            self._others.pop().__exit__(None, None, None)
        while len(self._others) < held:
            other = self.lock.brief(f"{KEY}:held:{len(self._others)}")
            other.__enter__()
            self._others.append(other)
        return held

    def threads(self, threads: int, keys: int, seconds: float) -> tuple[float, list[int]]:
        """Let `threads` take locks for so long, each the next key after its last one, then stay until `leave`.

        Returns: locks a second, and the nanoseconds of each, from before it was wanted until it was released; those
        that were wanted at the end are waited for, and are among them.
        """
        taken: list[list[int]] = [[] for _ in range(threads)]
        together = threading.Barrier(threads + 1, timeout=LIMIT)
        over = threading.Event()

        def work(number: int) -> None:
            mine = taken[number]
            with ExitStack() as stack:
                patient = self.make(self._place, stack).patient
                with patient(f"{KEY}:warm:{number}"):  # it has its connection
                    pass
                together.wait()
                for turn in itertools.count(number):
                    began = time.perf_counter_ns()
                    with patient(f"{KEY}:{turn % keys}"):
                        pass
                    mine.append(time.perf_counter_ns() - began)
                    if over.is_set():
                        break
                together.wait()
                self._leave.wait()

        self._leave.clear()
        self._crew = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for one in self._crew:
            one.start()
        together.wait()
        began = time.monotonic()
        over.wait(seconds)
        rate = sum(map(len, taken)) / (time.monotonic() - began)
        over.set()
        together.wait()
        return rate, list(itertools.chain(*taken))

    def leave(self) -> str:
        """Let the threads close what they opened."""
        self._leave.set()
        for one in self._crew:
            one.join()
        return "over"

    def crew(self, waiters: int, seconds: float) -> list[tuple[float, float, int]]:
        """Let `waiters` + 1 processes want one lock for so long; give when each got it and left it, in order."""
        pipes = [self._start(_contend) for _ in range(waiters + 1)]
        for pipe in pipes:
            pipe.recv()
        until = time.monotonic() + seconds
        for pipe in pipes:
            pipe.send(until)
        return sorted((got, left, number) for number, pipe in enumerate(pipes) for got, left in pipe.recv())

    def line_up(self, size: int) -> str:
        """Start `size` processes that take a step whenever they are told: they take the lock, release it, and end."""
        self._pipes = [self._start(_step) for _ in range(size)]
        for pipe in self._pipes:
            pipe.recv()
        return "ready"

    def step(self, number: int) -> str:
        """Let this process of the line go on to its next step."""
        self._pipes[number].send("go on")
        return "told"

    def said(self, number: int) -> Any:
        """Wait for what this process says after its step: when it wanted the lock and when it got it; or nothing."""
        return self._pipes[number].recv()

    def _start(self, work: Callable[[Make, Place, Any], None]) -> Any:
        here, there = _fork.Pipe()
        _fork.Process(target=work, args=(self.make, self._place, there), daemon=True).start()
        return here


COMMANDS = ("pairs", "hold_others", "threads", "leave", "crew", "line_up", "step", "said")


def _sampled(lock: Lock) -> Pairs:
    """Run empty blocks, a lock made for each."""
    make = lock.brief

    def run(pairs: int) -> list[int]:
        taken = []
        for _ in range(pairs):
            began = time.perf_counter_ns()
            with make(KEY):
                pass
            taken.append(time.perf_counter_ns() - began)
        return taken

    return run


def _contend(make: Make, place: Place, pipe: Any) -> None:
    with ExitStack() as stack:
        patient = make(place, stack).patient
        with patient(KEY):
            pass
        pipe.send("ready")
        until = pipe.recv()
        seen = []
        while time.monotonic() < until:
            with patient(KEY):
                got = time.monotonic()
                left = time.monotonic()
            seen.append((got, left))
        pipe.send(seen)


def _step(make: Make, place: Place, pipe: Any) -> None:
    with ExitStack() as stack:
        patient = make(place, stack).patient
        with patient(f"{KEY}:warm:{os.getpid()}"):
            pass
        pipe.send("ready")
        pipe.recv()
        wanted = time.monotonic()
        with patient(KEY):
            pipe.send((wanted, time.monotonic()))
            pipe.recv()
        pipe.send(None)
        pipe.recv()  # what it asks when it closes its connection is no part of the wait


def use_django(dsn: str) -> None:
    """Set Django up with one database."""
    import django
    from django.conf import settings

    where = urlsplit(dsn)
    query = parse_qs(where.query)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": where.path[1:],
        "USER": "postgres",
        "HOST": where.hostname or query["host"][0],
        "PORT": where.port or query["port"][0],
    }
    settings.configure(DATABASES={"default": database}, INSTALLED_APPS=[], USE_TZ=True)
    django.setup()


def main(name: str, place: Place) -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with ExitStack() as stack:
        try:
            stage: Stage | None = Stage(name, place, stack)
        except (ImportError, SyntaxError):  # the latter: written for a later Python
            stage = None
        print(json.dumps(stage.versions if stage else ABSENT), file=answers, flush=True)
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            if command in COMMANDS:
                print(json.dumps(getattr(stage, command)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.append(str(LIBRARIES.absolute()))
    if CONTESTANTS[sys.argv[1]].first is not None:  # it has our name
        sys.path.insert(0, str(CONTESTANTS[sys.argv[1]].first))
    main(sys.argv[1], Place(*json.loads(sys.argv[2])))
