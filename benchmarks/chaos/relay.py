"""A TCP relay before the lock store, whose connections can be cut, or held up."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

#: Close at once, with a reset.
_RESET = struct.pack("ii", 1, 0)


class Relay:
    """Listens on a port of its own, and passes on to `port`; each connection has a thread."""

    def __init__(self, port: int) -> None:
        """Begin to listen."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._links: set[tuple[socket.socket, socket.socket]] = set()
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Reset every connection, at both ends; say how many there were."""
        links = list(self._links)
        for link in links:
            for end in link:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)
        return len(links)

    def hold_up(self, seconds: float) -> None:
        """Pass nothing on for `seconds`; nothing is lost."""
        self._flows.clear()
        time.sleep(seconds)
        self._flows.set()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is being restarted
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        link = (client, server)
        self._links.add(link)
        other = {client: server, server: client}
        try:
            while True:
                for source in select.select(link, [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    self._flows.wait()
                    other[source].sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            self._links.discard(link)
            for end in link:
                end.close()
