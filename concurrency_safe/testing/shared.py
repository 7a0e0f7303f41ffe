"""One server for the whole process: the environment's when it names one, else our own.

For settings modules and session-wide fixtures, which have no block to open a server in.
"""

from __future__ import annotations

import atexit
import functools
import os

from concurrency_safe.testing.postgres import PostgresServer
from concurrency_safe.testing.valkey import ValkeyServer


@functools.cache
def embedded_postgres() -> PostgresServer:
    """Return this process's own PostgreSQL server, started by the first call.

    It ends with this process. Children that are forked meet the same server; children that are
    started find it when you pass `embedded_postgres().dsn` on to them in DATABASE_URL.
    """
    server = PostgresServer().start()
    atexit.register(server.stop)
    return server


@functools.cache
def embedded_valkey() -> ValkeyServer:
    """Return this process's own Valkey server, as `embedded_postgres` does."""
    server = ValkeyServer().start()
    atexit.register(server.stop)
    return server


def postgres_dsn() -> str:
    """Return DATABASE_URL when it is set, else the URL of `embedded_postgres()`."""
    return os.environ.get("DATABASE_URL") or embedded_postgres().dsn


def broker_url(variable: str = "CELERY_BROKER_URL") -> str:
    """Return the environment's broker when `variable` names one, else that of `embedded_valkey()`.

    Args:
        variable: "DRAMATIQ_BROKER_URL" for Dramatiq.
    """
    return os.environ.get(variable) or embedded_valkey().url
