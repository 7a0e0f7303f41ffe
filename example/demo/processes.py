"""The processes that the demo starts: tethered, and their output kept in case one fails."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]

#: How much of a failed process's output is worth showing, in characters.
TAIL = 3000


class DemoError(Exception):
    """Something that the demo needs is not there; the message is for the person watching."""


@dataclass(frozen=True)
class Tethered:
    """One server process behind its tether, and the file with its output."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def tail(self) -> str:
        """Return the end of what it printed."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-TAIL:].strip()


class Fleet:
    """The servers that run for the length of a `with` block, and end together."""

    def __init__(self) -> None:
        self._members: list[Tethered] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in self._members:
            if member.process.stdin:
                member.process.stdin.close()
        for member in self._members:
            member.process.wait()
            member.output.close()

    def start(self, name: str, *command: str, pass_fds: Sequence[int] = ()) -> None:
        """Start `python -m COMMAND...` as a server."""
        output = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the fleet
        process = subprocess.Popen(
            [sys.executable, "-m", "example.demo.tether", sys.executable, "-m", *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        self._members.append(Tethered(name, process, output))

    def wait_until(self, ready: Callable[[], bool], what: str, *, limit: float = 30.0) -> None:
        """Wait for the fact that `ready` asks for, as long as every server is alive.

        Raises: DemoError: a server ended, or `limit` seconds passed.
        """
        deadline = time.monotonic() + limit
        while not ready():
            self._check()
            if time.monotonic() > deadline:
                raise DemoError(f"{what} was not ready after {limit:.0f} s")
            time.sleep(0.05)

    def _check(self) -> None:
        for member in self._members:
            if member.process.poll() is not None:
                raise DemoError(f"{member.name} ended by itself; it said:\n{member.tail()}")
