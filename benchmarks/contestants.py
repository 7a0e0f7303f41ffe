"""What is measured, each in a process of its own: some need another Python, other modules, or Django set up.

`make bench` installs the other libraries into `.peers`; those that are not there are left out, and named.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rivals, yardsticks
from benchmarks.rivals import Make, Pairs, Place

#: Where `make bench` puts what is measured beside us: libraries for this Python, a newer Python with those that need
#: one, and the predecessor, whose package has our name.
PEERS = Path(".peers")
LIBRARIES, NEWER, PREDECESSOR = PEERS / "libraries", PEERS / "newer/bin/python", PEERS / "predecessor"

#: What the process of a contestant says that can't be had here.
ABSENT = "absent"

#: Under which name it tells the version of its Python.
PYTHON = "CPython"


class Entry(NamedTuple):
    """How a contestant is run.

    `make`: takes locks, also in many threads and processes; `pairs`: takes one in a way of its own. `django`: it needs
    Django set up; `python`: the interpreter; `first`: where its modules are looked for before ours; `redis`: it is no
    PostgreSQL's; `beside`: whose process it shares, so that what the processes differ in does not tell them apart;
    `libraries`: the distributions whose versions matter.
    """

    make: Make | None = None
    pairs: Callable[[Place], Pairs] | None = None
    django: bool = False
    python: Path = Path(sys.executable)
    first: Path | None = None
    redis: bool = False
    beside: str | None = None
    libraries: tuple[str, ...] = ("psycopg",)


#: What ratios are to: of a lock that nobody else wants, and of locks that are waited for.
YARDSTICK, BLOCKING = "psycopg, prepared pair", "psycopg, blocking"
OURS = "with lock(...)"
DECORATED, ASYNC, TRANSACTION = "@concurrency_safe", "async with lock(...)", "lock in a transaction"
#: No contestant: the difference between two of ours.
ALTERNATING = "with lock(...) and @concurrency_safe, in turn"

CONTESTANTS: dict[str, Entry] = {
    YARDSTICK: Entry(pairs=yardsticks.psycopg_pairs),
    BLOCKING: Entry(yardsticks.psycopg_lock),
    "libpq alone": Entry(pairs=yardsticks.libpq_pairs),
    OURS: Entry(yardsticks.ours, django=True, libraries=("psycopg", "Django")),
    DECORATED: Entry(pairs=yardsticks.decorated_pairs, beside=OURS),
    ALTERNATING: Entry(pairs=yardsticks.alternating_pairs, beside=OURS),
    ASYNC: Entry(pairs=yardsticks.async_pairs, beside=OURS),
    TRANSACTION: Entry(pairs=yardsticks.transaction_pairs, beside=OURS),
    "predecessor 0.0.2": Entry(rivals.predecessor, django=True, first=PREDECESSOR, libraries=("psycopg", "Django")),
    "django-pglock": Entry(rivals.django_pglock, django=True, libraries=("django-pglock",)),
    "django-pglock, transaction": Entry(
        pairs=rivals.django_pglock_transaction, django=True, libraries=("django-pglock",)
    ),
    "django-pgware": Entry(rivals.django_pgware, django=True, libraries=("django-pgware",)),
    "sqlalchemy-dlock": Entry(rivals.sqlalchemy_dlock, libraries=("sqlalchemy-dlock", "SQLAlchemy")),
    "pals": Entry(rivals.pals, libraries=("PALs", "SQLAlchemy")),
    "postgresql-lock": Entry(
        rivals.postgresql_lock,
        python=NEWER if sys.version_info < (3, 12) else Path(sys.executable),
        libraries=("postgresql-lock", "psycopg"),
    ),
    "redis-py Lock": Entry(rivals.redis_py, redis=True, libraries=("redis",)),
    "python-redis-lock": Entry(rivals.python_redis_lock, redis=True, libraries=("python-redis-lock", "redis")),
}

#: Those that can wait, and be used by many threads and processes.
LOCKS = [name for name, entry in CONTESTANTS.items() if entry.make is not None]


class Contestant:
    """The process of one contestant, as the benchmark sees it; what it can be asked is in `benchmarks.stage`."""

    def __init__(self, name: str, place: Place, beside: Contestant | None = None) -> None:
        """Start it, or share the process of `beside`; `is_there` says whether it can be had."""
        needed = [CONTESTANTS[name].python, CONTESTANTS[name].first]
        self.name = name
        self.versions: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        if beside is not None:
            self._process = beside.process
        elif all(path is None or path.exists() for path in needed):
            self._process = subprocess.Popen(
                [str(CONTESTANTS[name].python), "-m", "benchmarks.stage", name, json.dumps(place)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            answer = self.hear()
            if answer == ABSENT:
                self.close()
            else:
                self.versions = answer

    @property
    def is_there(self) -> bool:
        """Whether it runs."""
        return self._process is not None

    @property
    def process(self) -> subprocess.Popen[str]:
        """Its process."""
        assert self._process is not None, f"{self.name} is not there"  # noqa: S101 - the benchmark's own mistake
        return self._process

    def tell(self, command: str, *arguments: object) -> None:
        """Let it begin; `hear` gives the result."""
        assert self.process.stdin is not None  # noqa: S101 - see above: it is a pipe
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Wait for the result of what it was told last."""
        assert self.process.stdout is not None  # noqa: S101 - see above: it is a pipe
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended; what it said is above")
        return json.loads(line)

    def ask(self, command: str, *arguments: object) -> Any:
        """Let it do something, and wait for the result."""
        self.tell(command, *arguments)
        return self.hear()

    def pairs(self, pairs: int) -> list[int]:
        """Let it take and release its lock so many times; give the nanoseconds of each."""
        taken: list[int] = self.ask("pairs", self.name, pairs)
        return taken

    def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None and CONTESTANTS[self.name].beside is None:
            process.communicate()


@contextmanager
def contestants(names: Iterable[str], place: Place | Mapping[str, Place]) -> Iterator[dict[str, Contestant]]:
    """Start those of `names` that can be had, in one place, or each in a place of its own."""
    running: dict[str, Contestant] = {}
    try:
        for name in names:
            where = place if isinstance(place, Place) else place[name]
            one = Contestant(name, where, running.get(CONTESTANTS[name].beside or ""))
            if one.is_there:
                running[name] = one
        yield running
    finally:
        for one in running.values():
            one.close()


def versions(running: Iterable[Contestant]) -> list[str]:
    """Give the libraries of `running` and their versions; and the Python of those that have another one than we."""
    found: dict[str, None] = {}  # in order, each once
    for one in running:
        libraries = dict(one.versions)
        python = libraries.pop(PYTHON, platform.python_version())
        where = "" if python == platform.python_version() else f" (on {PYTHON} {python})"
        found |= dict.fromkeys(f"{name} {version}{where}" for name, version in libraries.items())
    return list(found)
