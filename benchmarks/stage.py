"""The process of a contestant: it does what the lines of its standard input say, and answers each by a line.

    python -m benchmarks.stage NAME PLACE

A line is a JSON list: a command of `COMMANDS`, and its arguments.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks.contestants import ABSENT, CONTESTANTS, LIBRARIES
from benchmarks.rivals import Lock, Make, Pairs, Place
from benchmarks.yardsticks import KEY

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
        self._others: list[Any] = []
        self._pipes: list[Any] = []

    @property
    def make(self) -> Make:
        """What takes its lock."""
        assert self._make is not None  # noqa: S101 - the benchmark asks `LOCKS` alone
        return self._make

    def pairs(self, name: str, pairs: int) -> list[int]:
        """Take and release the lock, which nobody else wants; give the nanoseconds of each."""
        if name not in self._pairs:
            self._pairs[name] = _sampled(self.make(self._place, self._stack))
        return self._pairs[name](pairs)

    def hold_others(self, held: int) -> int:
        """Take so many other locks of ours, in place of those taken before."""
        from concurrency_safe import configure, lock

        configure(max_held=held + 100)
        for one in self._others:
            one.release()
        self._others = [lock(("held", one)).acquire() for one in range(held)]
        return held

    def threads(self, threads: int, keys: int, seconds: float) -> float:
        """Let `threads` take locks for so long, each the next key after its last one; give locks a second."""
        done = [0] * threads
        ready = threading.Barrier(threads + 1)
        over = threading.Event()

        def work(number: int) -> None:
            with ExitStack() as stack:
                patient = self.make(self._place, stack).patient
                with patient(f"{KEY}:warm:{number}"):  # it has its connection
                    pass
                ready.wait()
                for turn in itertools.count():
                    if over.is_set():
                        return
                    with patient(f"{KEY}:{(number + turn) % keys}"):
                        pass
                    done[number] += 1

        crew = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for one in crew:
            one.start()
        ready.wait()
        began = time.monotonic()
        over.wait(seconds)
        rate = sum(done) / (time.monotonic() - began)
        over.set()
        for one in crew:
            one.join()
        return rate

    def crew(self, waiters: int, seconds: float) -> list[tuple[float, float, int]]:
        """Let `waiters` + 1 processes want one lock for so long; give when each got it and left it, in order."""
        pipes = [self._start(_contend) for _ in range(waiters + 1)]
        for pipe in pipes:
            pipe.recv()
        until = time.monotonic() + seconds
        for pipe in pipes:
            pipe.send(until)
        return sorted((got, left, number) for number, pipe in enumerate(pipes) for got, left in pipe.recv())

    def block(self) -> str:
        """Let one process hold the lock, and another one wait behind it, until `let_go`."""
        self._pipes = [self._start(_hold_until_told) for _ in range(2)]
        self._pipes[0].send("go")
        self._pipes[0].recv()
        self._pipes[1].send("go")
        return "blocked"

    def let_go(self) -> str:
        """Let the holder release, then the other one."""
        for pipe in self._pipes:
            pipe.send("release")
        self._pipes[1].recv()
        return "over"

    def _start(self, work: Callable[[Make, Place, Any], None]) -> Any:
        here, there = _fork.Pipe()
        _fork.Process(target=work, args=(self.make, self._place, there), daemon=True).start()
        return here


COMMANDS = ("pairs", "hold_others", "threads", "crew", "block", "let_go")


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


def _hold_until_told(make: Make, place: Place, pipe: Any) -> None:
    with ExitStack() as stack:
        patient = make(place, stack).patient
        pipe.recv()
        with patient(KEY):
            pipe.send("held")
            pipe.recv()


def use_django(dsn: str) -> None:
    """Set Django up with one database."""
    import django
    from django.conf import settings

    where = urlsplit(dsn)
    query = parse_qs(where.query)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "postgres",
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
        print(json.dumps("ready" if stage else ABSENT), file=answers, flush=True)
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            if command in COMMANDS:
                print(json.dumps(getattr(stage, command)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.append(str(LIBRARIES.absolute()))
    if CONTESTANTS[sys.argv[1]].first is not None:  # it has our name
        sys.path.insert(0, str(CONTESTANTS[sys.argv[1]].first))
    main(sys.argv[1], Place(*json.loads(sys.argv[2])))
