"""The tasks that `celery_throughput` measures; they do nothing but leave a mark that they ran."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from celery import Celery

from benchmarks.contestants import LIBRARIES
from concurrency_safe import assert_locked
from concurrency_safe.contrib.celery import ConcurrencySafeTask

BROKER = os.environ["CELERY_BROKER_URL"]
#: A file that gets one byte for each run: the cheapest thing that other processes can see.
MARKS = os.open(os.environ["BENCHMARK_MARKS"], os.O_WRONLY | os.O_APPEND)

sys.path.append(str(LIBRARIES.absolute()))

app = Celery("benchmarks", broker=BROKER)
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@app.task
def unguarded(number: int) -> None:
    os.write(MARKS, b".")


@app.task(base=ConcurrencySafeTask, lock_key="benchmark:{number}")
def guarded(number: int) -> None:
    assert_locked(f"benchmark:{number}")
    os.write(MARKS, b".")


TASKS: dict[str, Any] = {"unguarded": unguarded, "concurrency-safe": guarded}

if importlib.util.find_spec("celery_once"):
    from celery_once import QueueOnce

    app.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": BROKER, "default_timeout": 3600},
    }

    @app.task(base=QueueOnce, once={"keys": ["number"]})
    def once(number: int) -> None:
        os.write(MARKS, b".")

    TASKS["celery-once"] = once

if importlib.util.find_spec("celery_singleton"):
    from celery_singleton import Singleton

    app.conf.singleton_backend_url = BROKER

    @app.task(base=Singleton, unique_on=["number"])
    def singleton(number: int) -> None:
        os.write(MARKS, b".")

    TASKS["celery-singleton"] = singleton
