"""A process beside us that cannot outlive us: our end of the talk with a supervisor.

The other end is `supervisor`; what a server is, knows `server`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concurrency_safe.core.errors import ConcurrencySafeError
from concurrency_safe.testing import supervisor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Seconds a command around a server (initdb, createdb) may take.
COMMAND_LIMIT = 120.0


class ServerError(ConcurrencySafeError, RuntimeError):
    """A test server could not be started, or does not do as told."""


class SupervisedProcess:
    """One supervisor beside us, which ends when we end, and ends its server first.

    The end of a socket tells the supervisor that we are gone. So a start in any thread is as good
    as in another, and a child that we fork keeps nothing alive: it closes its copy.
    """

    def __init__(self, name: str) -> None:
        self._owner_pid = os.getpid()
        self._mutex = threading.Lock()
        self._asked = 0
        self._received = b""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, name],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                # Ctrl-C in a terminal is for us; we then stop the server in our own order.
                start_new_session=True,
            )
        _ours.add(self)
        self.scratch = Path(self._ask("scratch")["path"])

    @property
    def log(self) -> Path:
        """The file that has the server's output."""
        return self.scratch / "log"

    def run(self, argv: Sequence[str | Path], *, env: Mapping[str, str], identity: str = "self") -> str:
        """Run a command beside the server and return its output."""
        words = [str(word) for word in argv]
        reply = self._ask("run", argv=words, env=dict(env), identity=identity, timeout=COMMAND_LIMIT)
        if reply["code"] != 0:
            ended = "took too long" if reply["code"] is None else f"gave {reply['code']}"
            raise ServerError(f"{' '.join(words)} {ended}: {reply['output'].strip()}")
        return str(reply["output"])

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        identity: str = "self",
        stop_signal: int = signal.SIGTERM,
    ) -> int:
        """Start the server and return its pid."""
        words = [str(word) for word in argv]
        reply = self._ask("spawn", argv=words, env=dict(env), identity=identity, stop_signal=int(stop_signal))
        return int(reply["pid"])

    def signal(self, signum: int) -> None:
        """Send the server a signal; nothing happens when it has ended."""
        self._ask("signal", signum=int(signum))

    def wait(self, timeout: float) -> bool:
        """Wait for the server and its own children to end; tell whether they have."""
        return self._ask("wait", timeout=timeout)["code"] is not None

    def give(self, path: Path) -> None:
        """Give a directory of ours to the user that servers run as when root starts them."""
        self._ask("give", path=str(path))

    def close(self) -> None:
        """End the server, remove the scratch directory, and wait until that is done."""
        self._socket.close()
        self._process.wait()

    def _ask(self, verb: str, **values: object) -> dict[str, Any]:
        if os.getpid() != self._owner_pid:
            raise ServerError(
                f"the server belongs to process {self._owner_pid}, which started it; "
                f"process {os.getpid()} can use it, but not control it"
            )
        with self._mutex:
            self._asked += 1
            request = {"number": self._asked, "do": verb, **values}
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                reply = self._read()
                # An exception (Ctrl-C) may have kept us from reading what an earlier one returned.
                while reply["number"] != self._asked:
                    reply = self._read()
            except (OSError, EOFError) as error:
                raise ServerError("the server's supervisor has ended, and the server too") from error
        if "error" in reply:
            raise ServerError(reply["error"])
        return reply

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            chunk = self._socket.recv(65536)
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def forget(self) -> None:
        """Let go of a server that belongs to the process that we were forked from."""
        self._socket.close()
        # Not our child in this process, so neither to be waited for nor worth a ResourceWarning.
        self._process.returncode = 0


_ours: weakref.WeakSet[SupervisedProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for process in list(_ours):
        process.forget()


os.register_at_fork(after_in_child=_after_fork)
