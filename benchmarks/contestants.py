"""What is measured, each in a process of its own: some need another Python, other modules, or Django set up.

`make bench` installs the other libraries into `.peers`; those that are not there are left out, and named.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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


class Entry(NamedTuple):
    """How a contestant is run.

    `make`: takes locks, also in many threads and processes; `pairs`: takes one in a way of its own. `django`: it needs
    Django set up; `python`: the interpreter; `first`: where its modules are looked for before ours; `redis`: it is no
    PostgreSQL's; `beside`: whose process it shares, so that what the processes differ in does not tell them apart.
    """

    make: Make | None = None
    pairs: Callable[[Place], Pairs] | None = None
    django: bool = False
    python: Path = Path(sys.executable)
    first: Path | None = None
    redis: bool = False
    beside: str | None = None


YARDSTICK, OURS = "psycopg, prepared pair", "with lock(...)"
DECORATED, ASYNC, TRANSACTION = "@concurrency_safe", "async with lock(...)", "lock in a transaction"

CONTESTANTS: dict[str, Entry] = {
    YARDSTICK: Entry(yardsticks.psycopg_lock, yardsticks.psycopg_pairs),
    "libpq alone": Entry(pairs=yardsticks.libpq_pairs),
    OURS: Entry(yardsticks.ours, django=True),
    DECORATED: Entry(pairs=yardsticks.decorated_pairs, beside=OURS),
    ASYNC: Entry(pairs=yardsticks.async_pairs, beside=OURS),
    TRANSACTION: Entry(pairs=yardsticks.transaction_pairs, beside=OURS),
    "predecessor 0.0.2": Entry(rivals.predecessor, django=True, first=PREDECESSOR),
    "django-pglock": Entry(rivals.django_pglock, django=True),
    "django-pglock, transaction": Entry(pairs=rivals.django_pglock_transaction, django=True),
    "django-pgware": Entry(rivals.django_pgware, django=True),
    "sqlalchemy-dlock": Entry(rivals.sqlalchemy_dlock),
    "pals": Entry(rivals.pals),
    "postgresql-lock": Entry(
        rivals.postgresql_lock, python=NEWER if sys.version_info < (3, 12) else Path(sys.executable)
    ),
    "redis-py Lock": Entry(rivals.redis_py, redis=True),
    "python-redis-lock": Entry(rivals.python_redis_lock, redis=True),
}

#: Those that can wait, and be used by many threads and processes.
LOCKS = [name for name, entry in CONTESTANTS.items() if entry.make is not None]


class Contestant:
    """The process of one contestant, as the benchmark sees it; what it can be asked is in `benchmarks.stage`."""

    def __init__(self, name: str, place: Place, beside: Contestant | None = None) -> None:
        """Start it, or share the process of `beside`; `is_there` says whether it can be had."""
        python = CONTESTANTS[name].python
        self.name = name
        self._process: subprocess.Popen[str] | None = None
        if beside is not None:
            self._process = beside.process
        elif python.exists():
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.stage", name, json.dumps(place)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if self.hear() == ABSENT:
                self.close()

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
def contestants(names: Iterable[str], place: Place) -> Iterator[dict[str, Contestant]]:
    """Start those of `names` that can be had."""
    running: dict[str, Contestant] = {}
    try:
        for name in names:
            one = Contestant(name, place, running.get(CONTESTANTS[name].beside or ""))
            if one.is_there:
                running[name] = one
        yield running
    finally:
        for one in running.values():
            one.close()
