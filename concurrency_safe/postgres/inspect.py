"""Who holds a key: how a lock session says whose it is, and how that is read from the server's own views."""

from __future__ import annotations

import hashlib
import socket
from functools import lru_cache
from typing import NamedTuple

from psycopg.pq.abc import PGresult

from concurrency_safe import forks

#: PostgreSQL cuts an application_name at 63 bytes.
_NAME_BYTES = 63
_HOST_BYTES = 15


def session_name(work: str | None) -> str:
    """Give the application_name of a session that holds, or awaits, a lock.

    `work`: whose work it is for (a task's id); None: it has no name.
    """
    name = _process_name(forks.pid)
    return f"{name}:{short(work)}" if work else name


@lru_cache(maxsize=1)
def _process_name(pid: int) -> str:
    host = socket.gethostname().encode("ascii", "replace").decode()[:_HOST_BYTES]
    return f"cs:{host}:{pid}"


def short(work: str) -> str:
    """Give `work` as a session's name can carry it.

    That is `work` itself (a UUID fits), or a digest of what is too long or strange.
    """
    room = _NAME_BYTES - len("cs::0000000:") - _HOST_BYTES
    if len(work) <= room and work.isascii() and work.isprintable():
        return work
    return hashlib.blake2b(work.encode(), digest_size=room // 2).hexdigest()


def describe_work(work: str) -> str:
    """Say whose work it is, in the words of every holder's description; quoted, so that it can be searched for."""
    return f"running {short(work)!r}"


class Holder(NamedTuple):
    """A server process that holds a lock: its pid, the client's application_name and address ('' when unknown)."""

    pid: int
    application: str
    address: str

    def __str__(self) -> str:
        """Say it in a few words, for error messages."""
        ours, _, rest = self.application.partition(":")
        if ours == "cs" and rest.count(":") >= 1:
            host, pid, *work = rest.split(":", 2)
            what = f" {describe_work(work[0])}" if work else ""
            return f"{host} pid {pid}{what} (server process {self.pid})"
        words = [
            self.application and repr(self.application),
            self.address and f"from {self.address}",
        ]
        return " ".join(["server process", str(self.pid), *filter(None, words)])


def holders_of(result: PGresult) -> list[Holder]:
    """Read the rows of `sql.HOLDERS`; a prepared transaction has no process that could be named."""
    texts = [
        [(result.get_value(row, column) or b"").decode(errors="replace") for column in range(3)]
        for row in range(result.ntuples)
        if result.get_value(row, 0) is not None
    ]
    return [Holder(int(pid), application, address) for pid, application, address in texts]
