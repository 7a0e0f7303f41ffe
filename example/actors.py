"""The Dramatiq workers' program: `dramatiq example.actors`."""

from __future__ import annotations

import os

import django
import dramatiq
from django.apps import apps
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware
from example import settings

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example.settings")
if not apps.ready:
    django.setup()

broker = RedisBroker(url=settings.DRAMATIQ_BROKER_URL)  # type: ignore[no-untyped-call]
results = RedisBackend(url=f"{settings.DRAMATIQ_BROKER_URL}?socket_timeout=60")  # a result may take its time
broker.add_middleware(Results(backend=results, result_ttl=600_000))  # type: ignore[no-untyped-call]
broker.add_middleware(ConcurrencySafeMiddleware())
dramatiq.set_broker(broker)

from example.stock import actors  # noqa: E402, F401 - they are declared on the broker above
