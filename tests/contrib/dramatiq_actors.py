"""The actors whose real workers the Dramatiq tests start; they know their servers by the environment."""
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    GroupCallbacks,
    Middleware,
    Pipelines,
    Retries,
    ShutdownNotifications,
    SkipMessage,
    TimeLimit,
)
from dramatiq.rate_limits.backends import RedisBackend as Limits
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from concurrency_safe import Call, Retry, Skip, assert_locked, current_lock, lock
from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware

REDIS = os.environ.get("TESTS_RESULT_URL") or os.environ["TESTS_BROKER_URL"]
#: By default redis-py gives up sooner than a result comes.
RESULTS = RedisBackend(url=f"{REDIS}?socket_timeout=60")


class Killer(Middleware):
    """Kills the worker once, in the hook and at the actor that a variable names: after_process_message:patient."""

    def __init__(self, variable: str) -> None:
        self.hook, _, self.actor_name = os.environ.get(variable, "").partition(":")

    def __getattribute__(self, name: str) -> Any:
        own = super().__getattribute__
        return partial(kill, own("actor_name")) if name == own("hook") else own(name)


def kill(actor_name: object, _: Any, message: Any, **__: Any) -> None:
    mark = Path(os.environ["KILL_MARK"])
    if message.actor_name == actor_name and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def connect(url: str) -> Any:
    """Make a broker at `url`."""
    middleware: list[Any] = [
        AgeLimit(),
        TimeLimit(interval=int(os.environ.get("LIMIT_INTERVAL", "50"))),
        ShutdownNotifications(),
        Callbacks(),
        Pipelines(),
    ]
    middleware += [
        Retries(min_backoff=100, max_backoff=300),
        GroupCallbacks(Limits(url=REDIS)),
    ]
    middleware += [AsyncIO(), Killer("KILL_AT"), Results(backend=RESULTS), Killer("KILL_EARLY_AT")]
    middleware += [ConcurrencySafeMiddleware()]
    if url.startswith("amqp"):
        return RabbitmqBroker(url=url, middleware=middleware)
    return RedisBroker(
        url=url,
        middleware=middleware,
        heartbeat_timeout=int(os.environ.get("HEARTBEAT_TIMEOUT", "60000")),
        maintenance_chance=1_000_000 if "HEARTBEAT_TIMEOUT" in os.environ else 1000,
    )


broker = connect(os.environ["TESTS_BROKER_URL"])
if "QUIET" in os.environ:  # as `logging.config` does to the loggers that there are already
    broker.logger.disabled = True
dramatiq.set_broker(broker)

actor: Any = partial(dramatiq.actor, broker=broker, queue_name=os.environ.get("DRAMATIQ_QUEUE", "tests"))

SOON = Retry(delay=0.1, max_delay=0.3)

_never = threading.Event()


def write(statement: str, *params: object) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(statement, params)


def note(task: str, key: object) -> None:
    """Log that `task` got there."""
    write("INSERT INTO intervals VALUES (%s, %s, clock_timestamp(), clock_timestamp())", task, str(key))


def work(task: str, key: str, seconds: float = 0.05) -> str:
    """Take a while, and log the interval by the database's clock."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row
        connection.execute("SELECT pg_sleep(%s)", [seconds])
        connection.execute("INSERT INTO intervals VALUES (%s, %s, %s, clock_timestamp())", [task, key, row[0]])
    return key


@actor()
def failed(data: dict[str, Any], detail: dict[str, Any]) -> None:
    note("failed", f"{data['message_id']} {detail['type']}: {detail['message']}")


@actor()
def exhausted(data: dict[str, Any], detail: dict[str, Any]) -> None:
    note("exhausted", f"{data['message_id']} {detail}")


@actor()
def succeeded(data: dict[str, Any], result: object) -> None:
    note("succeeded", f"{data['message_id']} {result}")


#: A crowd on one key is done sooner when its messages wait a little: those that come back meet one another again.
guarding = {"lock_timeout": 0.06, "on_failure": "failed", "store_results": True, "max_retries": 0}


@actor(lock_key="job:{key}", on_conflict=SOON, **guarding)
def guarded(key: str, number: int) -> int:
    assert_locked(f"job:{key}")
    work("job", key)
    return number


@actor(lock_key="job:{key}", on_conflict=SOON, **guarding)
async def aguarded(key: str, number: int) -> int:
    assert_locked(f"job:{key}")
    await asyncio.to_thread(work, "job", key)
    return number


class ByClass(dramatiq.GenericActor):
    """An actor as a class."""

    class Meta:
        broker = broker
        actor_name = "by_class"
        queue_name = os.environ.get("DRAMATIQ_QUEUE", "tests")
        lock_key = "job:{key}"
        lock_timeout = 0.06
        on_conflict = SOON
        on_failure = "failed"
        store_results = True
        max_retries = 0

    def perform(self, key: str, number: int) -> int:
        assert_locked(f"job:{key}")
        work("job", key)
        return number


by_class: Any = ByClass


@actor(store_results=True)
def unguarded(key: str) -> str:
    return work("unguarded", key)


one = {"store_results": True, "on_failure": "failed", "on_retry_exhausted": "exhausted", "lock_key": "one:{key}"}


@actor(on_conflict=SOON, on_success="succeeded", max_retries=0, **one)
def patient(key: str) -> str:
    return key


@actor(on_conflict=Retry(delay=0.1, max_delay=0.1, limit=2), max_retries=5, **one)
def limited(key: str) -> str:
    return key


@actor(on_conflict=Skip(result="skipped"), **one)
def skipping(key: str) -> str:
    note("skipping", key)
    return key


@actor(on_conflict="raise", max_retries=1, **one)
def raising(key: str) -> str:
    note("raising", key)
    return key


@actor(on_conflict=lambda key: f"{key} is busy", **one)
def calling(key: str) -> str:
    return key


@actor(
    store_results=True,
    lock_key=lambda key: ("one", key),
    lock_timeout=0.05,
    on_conflict=Call(lambda conflict, key: f"{key}: {conflict.timeout}", pass_conflict=True),
)
def by_function(key: str) -> str:
    return key


@actor(store_results=True, lock_key=True)
def by_all_arguments(key: str, times: int = 1) -> str:
    held = current_lock()
    assert held is not None
    return held.keys[0]


@actor(on_conflict=SOON, max_retries=2, **(one | {"lock_key": "own:{key}"}))
def fails_twice(key: str) -> str:
    note("fails_twice", key)
    row = count("SELECT count(*) FROM intervals WHERE task = 'fails_twice' AND key = %s", key)
    if row <= 2:
        raise ValueError(key)
    return f"{row} runs"


def count(query: str, *params: object) -> int:
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        row = connection.execute(query, params).fetchone()
    assert row
    return int(row[0])


@actor(store_results=True)
def total(*values: object) -> list[object]:
    return list(values)


@actor()
def group_done(name: str) -> None:
    note("group_done", name)


@actor(lock_key="nested:{key}", on_conflict="raise", store_results=True)
def nests(key: str, depth: int) -> str:
    """Call itself directly, and take another lock inside."""
    if depth:
        return str(nests(key, depth - 1))
    with lock("inner", timeout=0):
        assert_locked("inner", f"nested:{key}")
    return key


def _sleep(task: str, key: str, seconds: float) -> str:
    """Wait where only an exception gets through, or until the test kills the process."""
    note(f"{task} began", f"{key} {os.getpid()}")
    for _ in range(round(seconds * 50)):
        _never.wait(0.02)
    note(task, key)
    return key


@actor(lock_key="slow:{key}", on_conflict=SOON, store_results=True, max_retries=1)
def sleeps(key: str, seconds: float) -> str:
    return _sleep("sleeps", key, seconds)


@actor(lock_key="slow:{key}", on_conflict="skip", store_results=True, max_retries=1)
def sleeps_or_skips(key: str, seconds: float) -> str:
    return _sleep("sleeps_or_skips", key, seconds)


@actor(lock_key="slow:{key}", on_conflict="raise", store_results=True, max_retries=0)
def sleeps_or_raises(key: str, seconds: float) -> str:
    return _sleep("sleeps_or_raises", key, seconds)


@actor(lock_key="slow:{key}", lock_timeout=None, time_limit=600, max_retries=0, store_results=True)
def waits(key: str) -> str:
    return key


async def _shielded(task: str, key: str, seconds: float) -> str:
    """Go on for a while after it is cancelled."""
    rest = asyncio.ensure_future(asyncio.to_thread(work, task, key, seconds))
    try:
        await asyncio.shield(rest)
    except asyncio.CancelledError:
        note(f"{task} cancelled", key)
        await rest
    return key


@actor(lock_key="shield:{key}", on_conflict=SOON, store_results=True, max_retries=0)
async def shields(key: str, seconds: float) -> str:
    return await _shielded("shields", key, seconds)


short: Any = {"time_limit": 500, "max_retries": 3, "min_backoff": 50, "max_backoff": 60, "store_results": True}


@actor(lock_key="again:{key}", on_conflict=SOON, **short)
async def again(key: str, seconds: float) -> str:
    return await _shielded("again", key, seconds)


@actor(lock_key="again-in-a-slot:{key}", lock_slots=2, **short)
async def again_in_a_slot(key: str, seconds: float) -> str:
    return await _shielded("again", key, seconds)


@actor(lock_key="again-shared:{key}", lock_shared=True, **short)
async def again_shared(key: str, seconds: float) -> str:
    return await _shielded("again", key, seconds)


@actor(lock_key="tick:{key}", store_results=True)
async def ticks(key: str, seconds: float) -> float:
    """Give the longest time that the event loop kept this waiting, in seconds."""
    loop = asyncio.get_running_loop()
    longest, end = 0.0, loop.time() + seconds
    note("ticks", key)
    while (before := loop.time()) < end:
        await asyncio.sleep(0.01)
        longest = max(longest, loop.time() - before - 0.01)
    return longest


@actor(lock_key="gate:{key}", lock_timeout=None, store_results=True)
def patient_at_gate(key: str) -> str:
    note("at_gate", key)
    write("SELECT FROM gate FOR SHARE")
    return key


@actor(lock_key="tick:{key}", lock_timeout=None, store_results=True)
async def awaits(key: str) -> str:
    return key


@actor(lock_key="none:{key}", store_results=True, max_retries=1, on_conflict="raise")
def misses(key: str | None) -> None:
    note("misses", key)


@actor(lock_key="tiny:{number}", store_results=True, max_retries=0)
def tiny(number: int) -> int:
    return number


once: Any = {"store_results": True, "max_retries": 0}


@actor(lock_key="brief:{key}", lock_timeout=None, **once)
def brief(key: str, seconds: float) -> str:
    """Work in small steps, so that an interrupt comes through; each a single call, which it can't leave half done."""
    for _ in range(round(seconds * 1000)):
        select.select([], [], [], 0.001)
    return key


@actor(store_results=True)
def at_gate(number: int) -> int:
    """Wait until the test opens the gate."""
    note("at_gate", number)
    write("SELECT FROM gate FOR SHARE")
    return number


@actor(lock_key="two", lock_slots=2, on_conflict=SOON, store_results=True, max_retries=0)
def two_at_gate(number: int) -> int:
    return int(at_gate.fn(number))


@actor(lock_key="one:{key}", lock_timeout=1.5, on_conflict=SOON, store_results=True, max_retries=0)
def stubborn(key: str) -> str:
    note("stubborn", key)
    return key


@actor(on_conflict=Retry(delay=2.5, jitter=False), on_success="succeeded", max_retries=0, **one)
def comes_later(key: str) -> str:
    note("comes_later", key)
    return key


@actor(on_conflict=SOON, max_retries=0, **one)
def skips_itself(key: str) -> str:
    note("skips_itself", key)
    raise SkipMessage("not today")


@actor(
    lock_key="brief:{key}",
    lock_timeout=0.02,
    on_conflict=Retry(delay=0.05, max_delay=0.1),
    **short | {"max_retries": 0},
)
def hurried(key: str, seconds: float) -> str:
    return str(brief.fn.__wrapped__(key, seconds))


@actor(lock_key="one:{key}", on_conflict="skip", store_results=True)
async def skipping_async(key: str) -> str:
    return key


@actor(store_results=True)
async def fills_the_executor(seconds: float) -> None:
    """Keep every thread of the loop's own executor busy."""
    threads = (os.cpu_count() or 1) + 4
    note("fills_the_executor", threads)
    await asyncio.gather(*(asyncio.to_thread(_never.wait, seconds) for _ in range(min(32, threads))))
