"""A Valkey (or Redis) server of our own, as a broker for tests and demos."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from concurrency_safe.testing.binaries import valkey_program
from concurrency_safe.testing.server import Server

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class ValkeyServer(Server):
    """A Valkey server on a free port of 127.0.0.1, gone when this process is gone.

    Args:
        settings: directives of valkey.conf, such as `{"appendonly": "yes"}`. Without that one,
            `kill()` and `restart()` lose what was stored.
        port: the port to take; None takes a free one.
    """

    _name = "valkey"

    def __init__(self, settings: Mapping[str, str] | None = None, *, port: int | None = None) -> None:
        super().__init__(port)
        self.settings = dict(settings or {})

    @property
    def url(self) -> str:
        """The URL of database 0, as Celery and Dramatiq take it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        self._program = valkey_program()
        (self._supervised.scratch / "data").mkdir()

    def _command(self) -> list[str | Path]:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": "",
            "daemonize": "no",
            "dir": str(self._supervised.scratch / "data"),
            **self.settings,
        }
        command: list[str | Path] = [self._program]
        for name, value in settings.items():
            command += [f"--{name}", value]
        return command

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\nPING\r\n")
                replies = b""
                # While it still reads its data, the reply is "-LOADING ...".
                while b"PONG\r\n" not in replies and b"-LOADING" not in replies:
                    chunk = connection.recv(65536)
                    if not chunk:
                        return False
                    replies += chunk
                # Its pid: another server may have taken the port just before ours.
                return b"PONG\r\n" in replies and f"process_id:{self.pid}\r\n".encode() in replies
        except OSError:
            return False
