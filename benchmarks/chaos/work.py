"""The guarded work, as Celery's and Dramatiq's workers run it.

Each run writes down when it began and when it ended, and that it was told of a loss: one line a fact, in one file.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import json
import os
import time
import uuid

import dramatiq
from celery import Celery
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AgeLimit, Retries, ShutdownNotifications, TimeLimit

from concurrency_safe import Retry, configure, current_lock
from concurrency_safe.contrib.celery import ConcurrencySafeTask
from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware

configure(dsn=os.environ["CHAOS_STORE"], fencing=True)

LOG = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND)

AGAIN = Retry(delay=0.1, max_delay=0.5, max_wait=None)


def note(fact: str, run: str, **fields: object) -> None:
    """Write a line, as a whole: shorter ones than a pipe's buffer are."""
    line = {"fact": fact, "run": run, "at": time.monotonic(), "pid": os.getpid(), **fields}
    os.write(LOG, json.dumps(line).encode() + b"\n")


def body(job: int, key: str, seconds: float, by: str) -> None:
    """Be busy with `key`, which nobody else is."""
    held = current_lock()
    if held is None:
        raise SystemExit(f"job {job} runs unguarded")
    run = uuid.uuid4().hex
    note("begin", run, job=job, key=key, token=held.token, by=by)
    held.on_lost(lambda _: note("lost", run))
    time.sleep(seconds)
    note("end", run)


celery = Celery("chaos", broker=os.environ["CHAOS_AMQP"], backend=os.environ["CHAOS_REDIS"])
celery.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
    result_expires=600,
)


@celery.task(base=ConcurrencySafeTask, lock_key="chaos:{key}", on_conflict=AGAIN)
def celery_job(job: int, key: str, seconds: float) -> None:
    """Do a job in a Celery worker."""
    body(job, key, seconds, "celery")


dramatiq.set_broker(
    RedisBroker(
        url=os.environ["CHAOS_REDIS"],
        middleware=[
            AgeLimit(),
            TimeLimit(),
            ShutdownNotifications(),
            Retries(min_backoff=100, max_backoff=1000),
            ConcurrencySafeMiddleware(),
        ],
        heartbeat_timeout=5000,
        maintenance_chance=100_000,
    )
)


@dramatiq.actor(queue_name="chaos", lock_key="chaos:{key}", on_conflict=AGAIN, max_retries=None)
def dramatiq_job(job: int, key: str, seconds: float) -> None:
    """Do a job in a Dramatiq worker."""
    body(job, key, seconds, "dramatiq")
