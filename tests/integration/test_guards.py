"""Guards at work: each policy, on a lock that another session holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial, wraps
from typing import Any

import pytest

from concurrency_safe import (
    Call,
    ConfigurationError,
    Guard,
    LockAcquireTimeout,
    LockUnavailable,
    Retry,
    Skip,
    concurrency_safe,
    configure,
    current_lock,
)
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import DIRECT
from concurrency_safe.memory import MemoryBackend
from tests.integration.conftest import Rival


def body(sku: str) -> str:
    held = current_lock()
    assert held is not None
    return f"{held.keys[0]} of {sku}"


def hiding(fn: Callable[[str], object]) -> Callable[[str], object]:
    """Wrap `fn`, as any decorator does."""

    @wraps(fn)
    def hidden(sku: str) -> object:
        return fn(sku)

    return hidden


def produce(sku: str) -> Iterator[str]:
    ran.append(sku)
    yield sku


async def produce_later(sku: str) -> AsyncIterator[str]:
    ran.append(sku)
    yield sku


ran: list[str] = []


@pytest.mark.parametrize(
    "decorated", [hiding(produce), contextmanager(produce), hiding(produce_later), asynccontextmanager(produce_later)]
)
def test_a_body_that_a_decorator_hides_does_not_run_after_the_release(decorated: Callable[[str], object]) -> None:
    with pytest.raises(ConfigurationError, match="its body runs after the lock's release"):
        concurrency_safe("k", backend=MemoryBackend())(decorated)("A")
    assert ran == []


def test_a_decorator_may_consume_a_generator() -> None:
    @wraps(produce)
    def first(sku: str) -> str:
        return next(produce(sku))

    assert concurrency_safe("k", backend=MemoryBackend())(first)("A") == "A"
    assert ran.pop() == "A"
    rows = concurrency_safe("k", backend=MemoryBackend())(lambda: (number for number in (1, 2)))()
    assert list(rows) == [1, 2]  # it said so itself


def test_a_guard_runs_decorates_and_gives_its_lock(rival: Rival) -> None:
    guard = Guard("stock:{sku}", timeout=0)

    assert guard.run(body, "A") == "stock:A of A"
    assert guard(body)(sku="A") == "stock:A of A"
    with guard.lock(body, "A") as held:
        assert held.keys == ("stock:A",)
        assert not rival.try_hold("stock:A")


@pytest.mark.parametrize(
    ("policy", "result"),
    [
        ("skip", None),
        (Skip("skipped"), "skipped"),
        (lambda sku: f"{sku} busy", "A busy"),
        (Call(lambda conflict, sku: (sku, conflict.key), pass_conflict=True), ("A", "stock:A")),
    ],
    ids=["skip", "Skip", "callable", "Call"],
)
def test_a_conflict_ends_as_the_policy_says(policy: object, result: object, rival: Rival) -> None:
    guarded = concurrency_safe("stock:{sku}", timeout=0, on_conflict=policy)(body)
    assert guarded("A") == "stock:A of A"
    rival.hold("stock:A")

    assert guarded("A") == result
    assert guarded("B") == "stock:B of B"


@pytest.mark.parametrize("policy", ["raise", Retry()], ids=["raise", "retry, with no queue behind"])
def test_a_conflict_is_raised(policy: object, rival: Rival) -> None:
    rival.hold("stock:A")

    with pytest.raises(LockAcquireTimeout, match="stock:A"):
        Guard("stock:{sku}", timeout=0, on_conflict=policy).run(body, "A")


@pytest.mark.parametrize(
    "policy", ["raise", "skip", lambda *_: "busy", Retry()], ids=["raise", "skip", "call", "retry"]
)
def test_a_store_that_is_away_is_no_conflict(policy: object, rival: Rival) -> None:
    configure(dsn="postgresql://nobody@127.0.0.1:1/none")

    with pytest.raises(LockUnavailable):
        Guard("stock:{sku}", timeout=0, on_conflict=policy).run(body, "A")


@pytest.mark.parametrize("options", [{"slots": 2}, {"shared": True}])
def test_a_work_that_several_may_do_is_done_once_at_a_time(options: dict[str, Any]) -> None:
    """A queue may deliver one message twice; another message's is no matter of it."""
    guard = Guard("gpu", backend=MemoryBackend(), **options)

    def body(depth: int) -> list[str]:
        def deeper(work: str) -> list[str]:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(once, work, depth + 1).result()

        return ["ran", *deeper("one"), *deeper("two")] if depth == 0 else ["ran"]

    def once(work: str, depth: int) -> list[str]:
        template = KeyTemplate("gpu", body)
        run = partial(guard.run_as, template, body, (depth,), {}, DIRECT)
        done: list[str] = guard.run_once(work, run, lambda met: [met.key], (depth,), {}, DIRECT)
        return done

    assert once("one", 0) == ["ran", "(concurrency_safe/one)", "ran"]


def test_a_conflict_of_the_work_itself_is_its_own() -> None:
    guard = Guard("gpu", slots=2, backend=MemoryBackend())

    def run() -> None:
        raise LockAcquireTimeout("of the body")

    with pytest.raises(LockAcquireTimeout, match="of the body"):
        guard.run_once("one", run, lambda _: pytest.fail("no copy"), (), {}, DIRECT)


def test_a_conflict_of_a_coroutines_work_itself_is_its_own() -> None:
    guard = Guard("gpu", slots=2, backend=MemoryBackend())

    async def run() -> None:
        raise LockAcquireTimeout("of the body")

    with pytest.raises(LockAcquireTimeout, match="of the body"):
        asyncio.run(guard.arun_once("one", run, lambda _: pytest.fail("no copy"), (), {}, DIRECT))
