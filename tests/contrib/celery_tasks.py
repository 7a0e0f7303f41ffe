"""The app whose real workers the Celery tests start; it knows its servers by the environment."""

from __future__ import annotations

import json
import os
from typing import Any

import psycopg
from celery import Celery
from celery.exceptions import Ignore, Reject
from kombu import serialization

from concurrency_safe import Call, Retry, Skip, assert_locked, configure, current_lock, lock
from concurrency_safe.contrib.celery import ConcurrencySafeTask

BROKER = os.environ["TESTS_BROKER_URL"]


def _encode(data: object) -> str:
    """Encode nowhere but in the tests' own process."""
    if "CELERY_QUEUE" in os.environ:
        raise ValueError("this encoding is read only")
    return json.dumps(data)


app = Celery("tests", set_as_current=False, broker=BROKER, backend=os.environ.get("TESTS_RESULT_URL", BROKER))
app.conf.task_default_queue = os.environ.get("CELERY_QUEUE", "tests")
app.conf.task_acks_late = True
app.conf.task_reject_on_worker_lost = True
app.conf.worker_prefetch_multiplier = 1
app.conf.worker_cancel_long_running_tasks_on_connection_loss = True
app.conf.broker_connection_retry_on_startup = True
app.conf.result_chord_retry_interval = 0.1
app.conf.accept_content = ["json", "pickle", "read-only"]
serialization.register("read-only", _encode, json.loads, content_type="application/x-read-only")
if "VISIBILITY_TIMEOUT" in os.environ:
    # By default Redis' transport looks for unacknowledged messages every 100 s or so.
    app.conf.broker_transport_options = {
        "visibility_timeout": int(os.environ["VISIBILITY_TIMEOUT"]),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }

if "ON_LOST" in os.environ:
    configure(on_lost=os.environ["ON_LOST"])

SOON = Retry(delay=0.1, max_delay=0.3)
AT_ONCE = Retry(delay=0.02, max_delay=0.04)


def write(statement: str, *params: object) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(statement, params)


def note(task: str, key: str) -> None:
    write("INSERT INTO intervals VALUES (%s, %s, clock_timestamp(), NULL)", task, key)


def note_attempt(task: Any) -> None:
    note(task.name, str(task.request.retries))


def work(task: str, key: str) -> str:
    """Take at least 50 ms, and log the interval by the database's clock."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row
        connection.execute("SELECT pg_sleep(0.05)")
        connection.execute("INSERT INTO intervals VALUES (%s, %s, %s, clock_timestamp())", [task, key, row[0]])
    return key


@app.task(base=ConcurrencySafeTask, lock_key="job:{key}", on_conflict="retry", max_retries=0, bind=True)
def guarded(self: Any, key: str) -> str:
    assert self.request.retries == 0
    assert_locked(f"job:{key}")
    assert self.lock.keys == (f"job:{key}",)
    return work("guarded", key)


@app.task(base=ConcurrencySafeTask, lock_key="late:{key}", on_conflict=SOON, max_retries=0, bind=True)
def acked_late(self: Any, key: str, number: int) -> int:
    assert self.request.retries == 0
    assert_locked(f"late:{key}")
    work(self.name, key)
    return number


@app.task(base=ConcurrencySafeTask, lock_key="early:{key}", on_conflict=SOON, max_retries=0, bind=True, acks_late=False)
def acked_early(self: Any, key: str, number: int) -> int:
    assert self.request.retries == 0
    work(self.name, key)
    return number


@app.task(base=ConcurrencySafeTask, lock_key="waiting:{key}", lock_timeout=0.03, on_conflict=SOON, bind=True)
def waits_a_little(self: Any, key: str, number: int) -> int:
    work(self.name, key)
    return number


@app.task
def unguarded(key: str) -> str:
    return work("unguarded", key)


@app.task(base=ConcurrencySafeTask)
def by_all_arguments(key: str, times: int = 1) -> list[str]:
    held = current_lock()
    assert held is not None
    return list(held.keys)


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=SOON)
def patient(key: str) -> str:
    return key


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=Retry(delay=0.1, max_delay=0.1, limit=2))
def limited(key: str) -> str:
    return key


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=Skip(result="skipped"))
def skipping(key: str) -> str:
    return key


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict="raise", autoretry_for=(Exception,))
def raising(key: str) -> str:
    return key


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=lambda key: f"{key} is busy")
def calling(key: str) -> str:
    return key


@app.task(
    base=ConcurrencySafeTask,
    lock_key=lambda key: ("one", key),
    lock_timeout=0.05,
    on_conflict=Call(lambda conflict, key: f"{key}: {conflict.timeout}", pass_conflict=True),
)
def by_function(key: str) -> str:
    return key


@app.task
def total(values: list[object]) -> list[object]:
    return values


@app.task(base=ConcurrencySafeTask, lock_key="own:{key}", on_conflict="skip", bind=True, max_retries=1)
def retries_itself(self: Any, key: str) -> str:
    """Send the next attempt at once, and need a while to unwind: the attempt meets this one at work."""
    if self.request.retries == 0:
        retry = self.retry(countdown=0, throw=False)
        write("SELECT pg_sleep(0.5)")
        raise retry
    return "done"


@app.task(base=ConcurrencySafeTask, lock_key="own:{key}", on_conflict=SOON, bind=True, max_retries=2)
def fails_twice(self: Any, key: str) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@app.task(base=ConcurrencySafeTask, lock_key="own:{key}", on_conflict=AT_ONCE, bind=True, max_retries=2)
def retries_by_hand(self: Any, key: str) -> None:
    note_attempt(self)
    raise self.retry(countdown=0, exc=ValueError("body"))


@app.task(
    base=ConcurrencySafeTask,
    lock_key="own:{key}",
    on_conflict=AT_ONCE,
    bind=True,
    autoretry_for=(ValueError,),
    retry_kwargs={"max_retries": 2, "countdown": 0},
)
def retries_by_option(self: Any, key: str) -> None:
    note_attempt(self)
    raise ValueError("body")


@app.task(base=ConcurrencySafeTask, lock_key="own:{key}", on_conflict=AT_ONCE, bind=True)
def retries_never(self: Any, key: str) -> None:
    note_attempt(self)
    raise ValueError("body")


@app.task(base=ConcurrencySafeTask, lock_key="own:{key}", bind=True, acks_on_failure_or_timeout=False)
def fails_and_is_requeued(self: Any, key: str) -> None:
    note_attempt(self)
    raise ValueError("body")


class Unhurried(ConcurrencySafeTask):
    """As on a busy host: a while passes between the lock's release and the storing of the state."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        write("SELECT pg_sleep(0.3)")
        return result


@app.task(base=Unhurried, lock_key="gate:{key}", lock_timeout=None)
def at_gate_unhurried(key: str) -> str:
    return str(at_gate.run(key))


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=SOON)
def counts(key: str, things: list[int]) -> int:
    return len(things)


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=SOON, acks_late=False)
def counts_early(key: str, things: list[int]) -> int:
    return len(things)


@app.task(base=ConcurrencySafeTask, lock_key="one:{key}", on_conflict=Retry(delay=0.05, max_delay=0.1, max_wait=0.5))
def waits_half_a_second(key: str) -> str:
    return key


@app.task
def failed(task_id: str) -> None:
    """Be the link_error of another task."""
    note("failed", task_id)


@app.task(base=ConcurrencySafeTask, lock_key="out:{how}", bind=True, acks_late=False)
def leaves(self: Any, how: str) -> str:
    write("INSERT INTO intervals VALUES ('leaves', %s, clock_timestamp(), clock_timestamp())", how)
    ways: dict[str, BaseException] = {
        "raise": ValueError("body"),
        "Ignore": Ignore(),
        "Reject": Reject("body", requeue=False),
        "SystemExit": SystemExit(1),
    }
    if how in ways:
        raise ways[how]
    if how == "Retry" and not self.request.retries:
        raise self.retry(countdown=0, max_retries=1)
    return how


@app.task(base=ConcurrencySafeTask, lock_key="slow:{key}", on_conflict=SOON, bind=True)
def sleeps(self: Any, key: str, seconds: float) -> str:
    """Block in the database; the test kills the process, or lets the limit pass."""
    write("INSERT INTO intervals VALUES ('sleeps', %s, clock_timestamp(), NULL)", str(os.getpid()))
    write("SELECT pg_sleep(%s)", seconds)
    return key


@app.task(base=ConcurrencySafeTask, lock_key="gate:{key}", on_conflict=SOON)
def at_gate(key: str) -> str:
    """Wait for as long as the test wants."""
    note("at_gate", key)
    write("SELECT FROM gate FOR SHARE")
    return key


@app.task(base=ConcurrencySafeTask, lock_key="pair:{key}", lock_slots=2, on_conflict=SOON)
def two_at_gate(key: str) -> str:
    return str(at_gate.run(key))


@app.task(base=ConcurrencySafeTask, lock_key="book:{key}", lock_shared=True, on_conflict=SOON)
def reads_at_gate(key: str) -> str:
    return str(at_gate.run(key))


@app.task(base=ConcurrencySafeTask, lock_key="book:{key}", on_conflict=SOON)
def writes(key: str) -> str:
    note("writes", key)
    return key


@app.task(base=ConcurrencySafeTask, lock_key="gate:{key}", bind=True)
def tells_whether_it_is_lost(self: Any, key: str) -> bool:
    """Wait like `at_gate`, and look at the lock before and after."""
    before = self.lock.is_lost
    at_gate.run(key)
    note(self.name, f"{before}, {self.lock.is_lost}")
    return bool(self.lock.is_lost)


@app.task(base=ConcurrencySafeTask, lock_key="slow-or-skip:{key}", on_conflict="skip")
def sleeps_or_skips(key: str, seconds: float) -> str:
    return str(sleeps.run(key, seconds))


@app.task(base=ConcurrencySafeTask, lock_key="slow-or-raise:{key}", on_conflict="raise")
def sleeps_or_raises(key: str, seconds: float) -> str:
    return str(sleeps.run(key, seconds))


@app.task(base=ConcurrencySafeTask, lock_key="slow:{key}", lock_timeout=None, soft_time_limit=1)
def waits(key: str) -> str:
    return key


@app.task(base=ConcurrencySafeTask, lock_key="endless:{key}", lock_timeout=None)
def endless(key: str) -> None:
    """Last until the soft limit, which may also come before the lock is there."""
    write("SELECT pg_sleep(60)")


class ByClass(ConcurrencySafeTask):
    """A task as a class."""

    name = "by_class"
    lock_key = "one:{key}"
    on_conflict = "raise"

    def run(self, key: str) -> str:
        assert_locked(f"one:{key}")
        return key


app.register_task(ByClass())


@app.task(base=ConcurrencySafeTask, lock_key="nested:{key}", on_conflict="raise", bind=True)
def nests(self: Any, key: str, depth: int) -> str:
    """Call itself directly, and take another lock inside."""
    if depth:
        return str(nests(key, depth - 1))
    with lock("inner", timeout=0):
        assert_locked("inner", f"nested:{key}")
    return key
