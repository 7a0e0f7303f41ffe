"""RabbitMQ for tests, with the life cycle of the other test servers, and no user, service or file of the system's."""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import socket
from typing import TYPE_CHECKING

import pytest

from concurrency_safe.testing import ServerError
from concurrency_safe.testing.server import Server, free_port
from tests.servers.fetch import FOLDER, RABBITMQ, erlang, library_path, rabbitmq_root

if TYPE_CHECKING:
    from pathlib import Path

#: Names a running server, instead of our own.
VARIABLE = "RABBITMQ_URL"
#: What a client says first. The server's answer has its name, among other properties.
#: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 4.2.2
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

#: Starts Erlang's name server as a child that the kernel ends with the node, and then the node. By itself a node starts
#: one that outlives it.
START = 'setpriv --pdeathsig KILL "$BINDIR/epmd" -address 127.0.0.1 & exec "$@"'


class RabbitMQServer(Server):
    """A RabbitMQ node on free ports of 127.0.0.1, gone when this process is gone; guest may do all."""

    _name = "rabbitmq"

    def __init__(self) -> None:
        super().__init__()
        self.node = f"cs-{secrets.token_hex(4)}"

    @property
    def url(self) -> str:
        """The URL of the virtual host "/", as Celery and Dramatiq take it."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def _prepare(self) -> None:
        root = rabbitmq_root()
        if root is None:
            raise ServerError("no RabbitMQ here; python -m tests.servers.fetch gets it")
        self._root = root
        self._home = max(root.glob(RABBITMQ))
        self._starter, self._erlang = erlang(root)

    def _command(self) -> list[str | Path]:
        # What rabbitmq-server(8) runs. No busy waiting: tests share the processor.
        node = ["-noinput", "-boot", "start_sasl", "-s", "rabbit", "boot", "+W", "w", "+Bi"]
        node += ["+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none"]
        node += ["-kernel", "inet_dist_use_interface", "{127,0,0,1}", "prevent_overlapping_partitions", "false"]
        node += ["-syslog", "logger", "[]", "-syslog", "syslog_error_logger", "false"]
        return ["sh", "-c", START, "sh", self._starter, *node]

    def _environment(self) -> dict[str, str]:
        scratch = self._supervised.scratch
        kept = {
            name: value for name, value in super()._environment().items() if not name.startswith(("RABBITMQ", "ERL"))
        }
        libraries = {"LD_LIBRARY_PATH": library_path(self._root)} if FOLDER in self._root.parents else {}
        return {
            **kept,
            **libraries,
            **self._erlang,
            "HOME": str(scratch),  # its cookie
            "ERL_LIBS": str(self._home / "plugins"),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(free_port()),
            "RABBITMQ_HOME": str(self._home),
            "RABBITMQ_NODENAME": f"{self.node}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_PLUGINS_DIR": str(self._home / "plugins"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(scratch / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(scratch / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(scratch / "none"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(scratch),
            "RABBITMQ_CONF_ENV_FILE": str(scratch / "none"),
            "RABBITMQ_MNESIA_BASE": str(scratch / "data"),
            "RABBITMQ_PID_FILE": str(scratch / "pid"),
            "RABBITMQ_LOG_BASE": str(scratch),
            "RABBITMQ_LOGS": "-",
        }

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(PROTOCOL_HEADER)
                # Its name: another server may have taken the port just before ours.
                return self.node.encode() in connection.recv(4096)
        except OSError:
            return False


@functools.cache
def embedded_rabbitmq() -> RabbitMQServer:
    """Return this process's own RabbitMQ server, started by the first call; it takes some seconds."""
    server = RabbitMQServer().start()
    atexit.register(server.stop)
    return server


def rabbitmq_url() -> str:
    """Return RABBITMQ_URL when it is set, else the URL of `embedded_rabbitmq()`."""
    return os.environ.get(VARIABLE) or embedded_rabbitmq().url


#: Marks tests that need it. In CI it has to be there.
needs_rabbitmq = pytest.mark.skipif(
    rabbitmq_root() is None and not {VARIABLE, "CI"} & os.environ.keys(),
    reason="no RabbitMQ: python -m tests.servers.fetch",
)
