"""Settings of the example: two addresses from the environment, and one line for the library.

`DATABASE_URL` and `CELERY_BROKER_URL` say where PostgreSQL and the broker are; the defaults are the
services of `docker-compose.yml`. `DRAMATIQ_BROKER_URL` is Dramatiq's Redis where Celery has another
broker. `CELERY_QUEUE` and `DRAMATIQ_QUEUE` name the queues, for a broker that others use as well.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from django.core.management.utils import get_random_secret_key

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://postgres:postgres@127.0.0.1:5432/concurrency_safe")
BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")


def database(url: str) -> dict[str, Any]:
    """Return Django's entry for the PostgreSQL at `url`; its query string becomes `OPTIONS`."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": options.pop("host", parts.hostname or ""),
        "PORT": str(parts.port or ""),
        "NAME": unquote(parts.path.lstrip("/")),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "CONN_MAX_AGE": 60,
        "OPTIONS": options,
    }


# Nothing here is signed for longer than the process lives.
SECRET_KEY = os.environ.get("SECRET_KEY") or get_random_secret_key()
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "example.urls"
DATABASES = {"default": database(DATABASE_URL)}

INSTALLED_APPS = ["concurrency_safe", "example.stock"]

CELERY_BROKER_URL = BROKER_URL
CELERY_RESULT_BACKEND = BROKER_URL if BROKER_URL.startswith("redis") else "rpc://"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_DEFAULT_QUEUE = os.environ.get("CELERY_QUEUE", "concurrency_safe_example")
# A task that a killed worker held goes to another one: the lock is free by then, see the README.
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_RESULT_EXPIRES = 600

DRAMATIQ_BROKER_URL = os.environ.get("DRAMATIQ_BROKER_URL", "redis://127.0.0.1:6379/0")
DRAMATIQ_QUEUE = os.environ.get("DRAMATIQ_QUEUE", "concurrency_safe_example")
