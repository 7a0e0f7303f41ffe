"""The public API as a user writes it: type-checked by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import assert_type

from concurrency_safe import (
    Call,
    ConcurrencySafeError,
    Guard,
    HeldLock,
    Lock,
    LockAcquireTimeout,
    LockDeadlock,
    Raise,
    Retry,
    Skip,
    assert_locked,
    concurrency_safe,
    configure,
    current_lock,
    lock,
)

# The lock itself.

with lock("stock:ABC", timeout=3.0) as held:
    assert_type(held, HeldLock)
    assert_type(held.keys, tuple[str, ...])
    assert_type(held.waited, float)
    assert_type(held.token, int | None)
    assert_type(held.is_lost, bool)
    held.check()
    held.on_lost(lambda lost: lost.keys)

with lock(("stock", 42), timeout=None, scope="detached", using="other"):
    assert_locked("stock:ABC", ("stock", 42))
    assert_type(current_lock(), HeldLock | None)

assert_type(lock("k"), Lock)
kept = lock("k", timeout=0).acquire()
assert_type(kept, HeldLock)
kept.release()

lock("k", timeout="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a text is no duration
lock(42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a number is no key

lock("a", ("b", 1), shared=True, max_waiters=3)
lock("gpu", slots=3)


async def with_a_lock() -> None:
    async with lock("k") as entered:
        assert_type(entered, HeldLock)
    acquired = await lock("k").aacquire()
    assert_type(acquired, HeldLock)
    await acquired.arelease()


# @concurrency_safe keeps the signature.


@concurrency_safe(key="report:{day}")
async def summarize(day: str) -> int:
    return len(day)


async def summaries() -> None:
    assert_type(await summarize("monday"), int)
    assert_type(await Guard("report:{day}").arun(summarize, "monday"), int)


@concurrency_safe(key="withdraw:user:{user_id}")
def withdraw(user_id: int, amount: float, *, note: str = "") -> bool:
    return bool(user_id and amount and note)


assert_type(withdraw(1, 2.5, note="rent"), bool)
as_a_value: Callable[[int, float], bool] = withdraw
withdraw("1", 2.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the parameter is an int
withdraw(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # amount is missing


@concurrency_safe("report:{day}", timeout=0, on_conflict="skip")
def report(day: str) -> list[str]:
    return [day]


assert_type(report("today"), list[str])


def busy(conflict: LockAcquireTimeout, sku: str) -> str:
    return f"{sku}: {conflict.holder}"


@concurrency_safe(key=("stock", "{sku}"), on_conflict=Call(busy, pass_conflict=True))
def parts(sku: str) -> str:
    return sku


@concurrency_safe(key=True, timeout=None, on_conflict=Skip(result=0))
def everything(number: int) -> int:
    return number


def key_of(account: int, _amount: int) -> tuple[object, ...]:
    return ("account", account)


@concurrency_safe(key=key_of, on_conflict=busy)
def pay(account: int, _amount: int) -> None: ...


class Account:
    """A method is guarded as a function is."""

    def __init__(self, pk: int) -> None:
        self.pk = pk

    @concurrency_safe(key="account:{self.pk}", on_conflict=Raise())
    def close(self, reason: str) -> str:
        return reason


assert_type(Account(1).close("moved"), str)

# Guard

guard = Guard("stock:{sku}", timeout=1.0, on_conflict=Raise)


def count(sku: str, *, by: int = 1) -> int:
    return len(sku) + by


assert_type(guard.run(count, "ABC", by=2), int)
assert_type(guard.lock(count, "ABC"), Lock)
assert_type(guard(count)("ABC", by=2), int)
guard.run(count, 42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # sku is a text
assert_type(hash(guard), int)

# Policies, settings, errors

Guard("k", on_conflict=Retry(delay=0.5, max_delay=10.0, factor=2.0, jitter=False, limit=3, max_wait=None))
configure(dsn="postgresql://localhost/app", timeout=1.0, pool_size=2)

try:
    withdraw(1, 2.5)
except LockDeadlock as deadlock:
    assert_type(deadlock.holder, str | None)
except LockAcquireTimeout as conflict:
    assert_type(conflict.key, str | None)
    assert_type(conflict.timeout, float | None)
    assert_type(conflict.waited, float | None)
    timeout_error: TimeoutError = conflict
except ConcurrencySafeError as error:
    assert_type(error.key, str | None)
