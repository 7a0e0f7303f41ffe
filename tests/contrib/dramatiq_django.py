"""A project with django_dramatiq, for real workers; run as a program it makes the tables."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os
from typing import Any

import django
from django.conf import settings

from example.settings import database

URL = os.environ["TESTS_BROKER_URL"]

settings.configure(
    SECRET_KEY="x" * 60,
    DATABASES={"default": database(os.environ["DATABASE_URL"]) | {"CONN_MAX_AGE": 0}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django_dramatiq", "concurrency_safe"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    DRAMATIQ_BROKER={
        "BROKER": "dramatiq.brokers.redis.RedisBroker",
        "OPTIONS": {"url": URL},
        "MIDDLEWARE": [
            # Before those that close connections: the place does not matter.
            "concurrency_safe.contrib.dramatiq.ConcurrencySafeMiddleware",
            "dramatiq.middleware.TimeLimit",
            "dramatiq.middleware.Callbacks",
            "dramatiq.middleware.Retries",
            "django_dramatiq.middleware.AdminMiddleware",
            "django_dramatiq.middleware.DbConnectionsMiddleware",
        ],
    },
    DRAMATIQ_RESULT_BACKEND={
        "BACKEND": "dramatiq.results.backends.redis.RedisBackend",
        "BACKEND_OPTIONS": {"url": f"{URL}?socket_timeout=60"},
    },
)
django.setup()

import dramatiq  # noqa: E402 - the broker is there by now
import psycopg  # noqa: E402
from django.db import close_old_connections, connection  # noqa: E402

from concurrency_safe import Retry  # noqa: E402
from concurrency_safe.core.keys import lock_key  # noqa: E402

actor: Any = dramatiq.actor


@actor(
    queue_name=os.environ.get("DRAMATIQ_QUEUE", "tests"),
    lock_key="django:{number}",
    on_conflict=Retry(delay=0.1, max_delay=0.3),
    store_results=True,
)
def closes(number: int) -> list[bool]:
    """Close Django's connection in every way there is; say each time whether the lock is held."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as other:

        def is_held() -> bool:
            row = other.execute("SELECT NOT pg_try_advisory_lock(%s)", [lock_key(f"django:{number}").number]).fetchone()
            assert row
            return bool(row[0])

        connection.ensure_connection()
        close_old_connections()
        first = is_held()
        connection.ensure_connection()
        connection.close()
        return [first, is_held()]


if __name__ == "__main__":
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
