"""What every test server has in common: start, stop, kill, restart, and a port of its own.

What is particular to PostgreSQL or Valkey is in `postgres` and `valkey`.
"""

from __future__ import annotations

import abc
import contextlib
import os
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING

from concurrency_safe.testing.process import ServerError, SupervisedProcess

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

#: Seconds a server may take to accept connections. It takes 0.1 s; on a loaded machine, longer.
START_LIMIT = 60.0
#: Seconds between two looks whether a server is ready.
READY_PERIOD = 0.01
#: Ports are taken from here: below the range that the kernel hands to outgoing connections and to
#: `bind(0)`, so that a port is still ours when its server comes back after a kill.
PORTS = range(15000, 32000)
#: How often another port is tried when somebody takes ours between the look and the start.
PORT_ATTEMPTS = 10
#: Lines of a server's log that an error shows.
LOG_LINES = 15


class Server(abc.ABC):
    """A server on a free port of the loopback interface, for the life of this process at most."""

    _name: str
    _stop_signal: int = signal.SIGTERM
    _identity: str = "self"

    def __init__(self, port: int | None = None) -> None:
        self._process: SupervisedProcess | None = None
        self.port = port or 0
        self.pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the server and return when it accepts connections.

        After `kill()` it comes back on the same port with the same data. A server that runs is
        left as it is.
        """
        first = self._process is None
        try:
            if first:
                self._process = SupervisedProcess(f"concurrency_safe-{self._name}")
                self._prepare()
            if not self.running:
                self._launch()
        except BaseException:
            if first:
                self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the server and remove its data. A server that is not there is no error."""
        if self._process is not None:
            process, self._process = self._process, None
            process.close()

    def restart(self) -> None:
        """End the server in good order and start it again, same port, same data."""
        self._end(self._stop_signal)
        self.start()

    def kill(self) -> None:
        """Kill the server as a crash does (SIGKILL) and return when it is gone.

        Follow with `start()` to have it back.
        """
        self._end(signal.SIGKILL)

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return self._process is not None and bool(self.pid) and not self._process.wait(0)

    @property
    def log(self) -> Path:
        """The file that has the server's output; it goes with the server."""
        return self._supervised.log

    @property
    def _supervised(self) -> SupervisedProcess:
        if self._process is None:
            raise ServerError(f"the {self._name} server is not started; call start() first")
        return self._process

    def _end(self, signum: int) -> None:
        self._supervised.signal(signum)
        if not self._supervised.wait(START_LIMIT):
            raise ServerError(
                f"the {self._name} server (pid {self.pid}) did not end {START_LIMIT:g} s after "
                f"{signal.Signals(signum).name}"
            )

    def _launch(self) -> None:
        """Start the process; at first, on another port when somebody takes ours in between."""
        chooses_port = not self.port
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            self.port = self.port or free_port()
            offset = self.log.stat().st_size
            self.pid = self._supervised.spawn(
                self._command(),
                env=self._environment(),
                identity=self._identity,
                stop_signal=self._stop_signal,
            )
            if self._wait_until_ready():
                return
            output = self.log.read_bytes()[offset:].decode(errors="replace")
            taken = "Address already in use" in output
            if not (chooses_port and taken and attempts_left):
                tail = "\n".join(output.splitlines()[-LOG_LINES:])
                raise ServerError(f"the {self._name} server did not start:\n{tail}")
            self.port = 0

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + START_LIMIT
        while not self._is_ready():
            if self._supervised.wait(READY_PERIOD):
                return False
            if time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                return False
        return True

    def _find_identity(self, *probe: str | Path) -> str | None:
        """Return who a server that refuses root is to be, by running a harmless command of it.

        Root becomes a plain user in a user namespace, as that needs no other user's rights on our
        directories; where namespaces are forbidden (as in many containers) another user, by its
        number. None: neither can run the command.
        """
        if os.geteuid() != 0:
            return "self"
        for identity in ("namespace", "nobody"):
            with contextlib.suppress(ServerError):
                self._supervised.run(probe, env=self._environment(), identity=identity)
                return identity
        return None

    def _environment(self) -> dict[str, str]:
        """Return an environment without what would steer a server from outside."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return {**kept, "LC_ALL": "C"}

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Do what is to be done once, before the first start."""

    @abc.abstractmethod
    def _command(self) -> list[str | Path]:
        """Return the command that runs the server in the foreground."""

    @abc.abstractmethod
    def _is_ready(self) -> bool:
        """Tell whether the process `self.pid` accepts connections."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            # As servers do: a connection of a former server in TIME_WAIT is no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
