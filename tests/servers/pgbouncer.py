"""PgBouncer in front of a PostgreSQL server, with the life cycle of the other test servers."""

from __future__ import annotations

import signal
import socket
import struct
from typing import TYPE_CHECKING

from concurrency_safe.testing import ServerError
from concurrency_safe.testing.server import Server
from tests.servers.fetch import FOLDER, library_path, pgbouncer_program

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from concurrency_safe.testing import PostgresServer

#: Asks a server for TLS: eight bytes that every one answers with one, before anything else.
#: https://www.postgresql.org/docs/current/protocol-message-formats.html
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class PgBouncer(Server):
    """A pooler on a free port of 127.0.0.1, in transaction mode, gone when this process is gone.

    Args:
        postgres: the server behind it, which is started.
        settings: settings of the section [pgbouncer].
    """

    _name = "pgbouncer"
    # It has nothing to save, and newer versions take a softer signal as "when all have left".
    _stop_signal = signal.SIGKILL

    def __init__(self, postgres: PostgresServer, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.postgres = postgres
        self.settings = {
            "pool_mode": "transaction",
            "auth_type": "any",
            "max_client_conn": "200",
            "ignore_startup_parameters": "extra_float_digits",
            **(settings or {}),
        }

    @property
    def dsn(self) -> str:
        """The URL of the database `postgres` through the pooler."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def _prepare(self) -> None:
        program = pgbouncer_program()
        if program is None:
            raise ServerError("no PgBouncer here; python -m tests.servers.fetch gets it")
        self._program = program
        # It refuses to run as root, as PostgreSQL does.
        identity = self._find_identity(program, "--version")
        if identity is None:
            raise ServerError(f"{program} cannot be run by another user than root")
        self._identity = identity

    def _command(self) -> list[str | Path]:
        conf = self._supervised.scratch / "pgbouncer.ini"
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            **self.settings,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        behind = f"* = host=127.0.0.1 port={self.postgres.port} user=postgres"
        conf.write_text("\n".join(["[databases]", behind, "[pgbouncer]", *lines, ""]))
        if self._identity == "nobody":
            self._supervised.give(self._supervised.scratch)
        return [self._program, conf]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(SSL_REQUEST)
                return connection.recv(1) in (b"N", b"S")
        except OSError:
            return False

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        if FOLDER in self._program.parents:
            environment["LD_LIBRARY_PATH"] = library_path(FOLDER / "pgbouncer")
        return environment
