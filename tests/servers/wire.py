"""A wire between the library and a real server that fails when a test says so: cut, silent, or out of its mind."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from psycopg import conninfo


class Link:
    """One connection through the wire."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.silent = False

    def silence(self) -> None:
        """Lose every packet from now on; both ends stay open, and hear nothing more."""
        self.silent = True

    def cut(self) -> None:
        """End the connection on both sides."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


#: What happens to a statement on its way to the server: what goes on instead of it; empty: nothing.
Fault = Callable[[Link, bytes], bytes]


def cut(link: Link, _: bytes) -> bytes:
    """Lose the connection, as at a crash of the server."""
    link.cut()
    return b""


def silence(link: Link, _: bytes) -> bytes:
    """Lose every packet from now on, as a firewall that forgot the connection."""
    link.silent = True
    return b""


def nonsense(link: Link, _: bytes) -> bytes:
    """Answer with bytes that are no message of the protocol."""
    link.client.sendall(b"\x01" * 64)
    return b""


def replaced(old: bytes, new: bytes) -> Fault:
    """Let the server read something else, of the same length."""
    assert len(old) == len(new)
    return lambda _, data: data.replace(old, new)


class Wire:
    """Listens on a port of its own, and passes on what it gets to the server of `dsn`."""

    def __init__(self, dsn: str) -> None:
        given = conninfo.conninfo_to_dict(dsn)
        self._target = (str(given.get("host") or "127.0.0.1"), int(given.get("port") or 5432))
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Else it grows, on some systems to more than any statement here.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        port = self._listener.getsockname()[1]
        self.dsn = conninfo.make_conninfo(dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        self.links: list[Link] = []
        self._faults: list[tuple[bytes, Fault]] = []
        self.deaf = False
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def fail(self, fragment: bytes, fault: Fault) -> None:
        """Do `fault` to the next piece from a client that has `fragment` in it; once."""
        self._faults.append((fragment, fault))

    def hang_up(self) -> None:
        """Refuse new connections from now on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        """End it; the server has ended the sessions when this returns (it may have to drop their database)."""
        self.hang_up()
        for link in self.links:
            with contextlib.suppress(OSError):
                link.client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for link in self.links:
            link.client.close()
            with contextlib.suppress(OSError):
                link.server.shutdown(socket.SHUT_WR)
                link.server.settimeout(5)
                while link.server.recv(65536):
                    pass
            link.server.close()

    def _run(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                host, port = self._target
                if host.startswith("/"):
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(f"{host}/.s.PGSQL.{port}")
                else:
                    server = socket.create_connection((host, port))
                link = Link(client, server)
                link.silent = self.deaf
                self.links.append(link)
                self._run(self._pass_on, link)

    def _pass_on(self, link: Link) -> None:
        try:
            self._pass_on_until_the_end(link)
        except OSError:
            pass
        finally:
            if not link.silent:  # then both ends stay open, and hear nothing more
                for end in (link.client, link.server):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_WR)

    def _pass_on_until_the_end(self, link: Link) -> None:
        other = {link.client: link.server, link.server: link.client}
        while not link.silent:
            ready, _, _ = select.select(list(other), [], [])
            for source in ready:
                data = source.recv(65536)
                if not data or link.silent:
                    return
                if source is link.client:
                    data = self._harm(link, data)
                other[source].sendall(data)

    def _harm(self, link: Link, data: bytes) -> bytes:
        for number, (fragment, fault) in enumerate(self._faults):
            if fragment in data:
                del self._faults[number]
                return fault(link, data)
        return data
