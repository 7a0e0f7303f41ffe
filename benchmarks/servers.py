"""What is done with the servers of a benchmark: binding them to a processor, and hearing what they are asked."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import psycopg
import redis

from benchmarks.contestants import CONTESTANTS, Contestant
from concurrency_safe.testing import PostgresServer, ValkeyServer

#: Counts what a server was asked since the last call, by session.
Heard: TypeAlias = Callable[[], Counter[str]]

#: A statement in PostgreSQL's log, and the process that was asked. The line begins with the time, by default.
_STATEMENT = re.compile(rb"^\S+ \S+ \S+ \[(\d+)\] LOG:  (?:execute [^:]+|statement): ", re.MULTILINE)


def bind(
    running: Iterable[Contestant], servers: Iterable[PostgresServer | ValkeyServer], where: tuple[int, int]
) -> None:
    """Bind the contestants to the first processor of `where`, the servers and all their processes to the second.

    What they start later is bound, too.
    """
    client, server = where
    bind_processes({one.process.pid for one in running}, {client})
    bind_processes(family(servers), {server})


def bind_processes(pids: Iterable[int], processors: set[int]) -> None:
    """Bind these processes, and each thread of theirs."""
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # a process or thread that has just ended
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), processors)


def family(servers: Iterable[PostgresServer | ValkeyServer]) -> set[int]:
    """Give the processes of `servers`, and their children."""
    pids = {one.pid for one in servers}
    children = set()
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):
            pid = int(entry.name)
            if int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) in pids:
                children.add(pid)
    return pids | children


def versions(server: PostgresServer, valkey: ValkeyServer | None = None) -> list[str]:
    """Give the names and versions of the servers."""
    with psycopg.connect(server.dsn) as connection:
        found = [f"PostgreSQL {connection.execute('SHOW server_version').fetchone()[0].split()[0]}"]  # type: ignore[index]
    if valkey is not None:
        with redis.Redis.from_url(valkey.url) as client:
            about = client.info("server")
        ours = "valkey_version" in about
        found.append(f"Valkey {about['valkey_version']}" if ours else f"Redis {about['redis_version']}")
    return found


@contextmanager
def listening(server: PostgresServer, valkey: ValkeyServer, name: str) -> Iterator[Heard]:
    """Listen to what the server of contestant `name` is asked: PostgreSQL's statements, or Valkey's commands."""
    if CONTESTANTS[name].redis:
        with _commands(valkey) as heard:
            yield heard
    else:
        with _statements(server) as heard:
            yield heard


@contextmanager
def _statements(server: PostgresServer) -> Iterator[Heard]:
    """By the log, which has a statement before it is executed."""
    _log_statements(server, "all")
    read = server.log.stat().st_size

    def heard() -> Counter[str]:
        nonlocal read
        with server.log.open("rb") as log:
            log.seek(read)
            new = log.read()
        new = new[: new.rfind(b"\n") + 1]
        read += len(new)
        return Counter(pid.decode() for pid in _STATEMENT.findall(new))

    try:
        yield heard
    finally:
        _log_statements(server, "none")


def _log_statements(server: PostgresServer, which: str) -> None:
    """Let PostgreSQL log `which` statements; other sessions know it before their next one."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SHOW log_statement").fetchone() != (which,):
            pass


@contextmanager
def _commands(valkey: ValkeyServer) -> Iterator[Heard]:
    """By MONITOR, which has what clients send, and, marked, what their scripts call, which is left out."""
    markers = (f"heard-{number}" for number in itertools.count())
    with redis.Redis.from_url(valkey.url) as client, client.monitor() as monitor:

        def heard() -> Counter[str]:
            found: Counter[str] = Counter()
            marker = next(markers)
            client.echo(marker)
            for each in monitor.listen():
                session = f"{each['client_address']}:{each['client_port']}"
                if each["client_type"] != "lua":
                    found[session] += 1
                if each["command"].endswith(marker):
                    del found[session]  # which is ours
                    break
            return found

        yield heard
