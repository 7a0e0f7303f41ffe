"""Tasks of an event loop: nobody overlaps, the loop goes on, and a cancelled task leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncRequestFactory

from concurrency_safe import (
    Call,
    ConfigurationError,
    Guard,
    HeldLock,
    LockAcquireTimeout,
    LockInTransaction,
    LockLost,
    LockNotHeld,
    assert_locked,
    concurrency_safe,
    configure,
    current_lock,
    lock,
)
from concurrency_safe.core.steps import TURN, GateWait, Steps
from concurrency_safe.gates import gate_for
from concurrency_safe.postgres import loop as loops
from concurrency_safe.postgres.loop import finish
from concurrency_safe.spaces import close_idle_sessions
from tests.integration.conftest import LockStore, Rival, wait_for
from tests.integration.test_interrupts import unmeasured

pytestmark = pytest.mark.usefixtures("store")

TASKS = 300
KEYS = 20
ROUNDS = 80
CANCELLATIONS = 500


@asynccontextmanager
async def gaps() -> AsyncIterator[list[float]]:
    """Measure how long the event loop is away from a task that does nothing but come back."""
    seen: list[float] = []

    async def look() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0)
            now = time.monotonic()
            seen.append(now - last)
            last = now

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()


class Turns:
    """Counts the locks that are taken in one turn of an event loop, each of which takes some time."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._in_this_turn = self.most = 0

    async def work(self, locks: AsyncGenerator[None]) -> None:
        async with aclosing(locks):
            await anext(locks)
            for _ in range(ROUNDS - 1):
                until = time.monotonic() + self._least
                while time.monotonic() < until:
                    pass
                await anext(locks)
                self._in_this_turn += 1
                self.most = max(self.most, self._in_this_turn)

    async def look(self) -> None:
        while True:
            self._in_this_turn = 0
            await asyncio.sleep(0)

    async def gather(self, *all_locks: AsyncGenerator[None]) -> None:
        looking = asyncio.create_task(self.look())
        await asyncio.gather(*map(self.work, all_locks))
        looking.cancel()


async def _blocks() -> AsyncGenerator[None]:
    while True:
        async with lock("one"):
            yield


async def _acquired() -> AsyncGenerator[None]:
    kept: list[HeldLock] = []
    try:
        while True:
            kept.append(await lock(f"key {len(kept)}").aacquire())
            yield
    finally:
        for held in kept:
            await held.arelease()


async def _released() -> AsyncGenerator[None]:
    for held in [await lock(f"key {number}").aacquire() for number in range(ROUNDS)]:
        await held.arelease()
        yield


@pytest.mark.parametrize("locks", [_blocks, _acquired, _released])
def test_a_task_that_takes_locks_without_rest_leaves_turns_to_others(
    locks: Callable[[], AsyncGenerator[None]],
) -> None:
    """The busy thread runs whenever a statement is sent, so every answer is there by the first look."""
    is_over = False

    def be_busy() -> None:
        while not is_over:
            sum(range(2000))

    turns = Turns(TURN / 2)
    busy = threading.Thread(target=be_busy)
    busy.start()
    try:
        asyncio.run(turns.gather(locks()))
    finally:
        is_over = True
        busy.join()
    assert turns.most <= 3


def test_a_loop_that_ends_amid_a_turn_is_none_of_the_next_one() -> None:
    async def end() -> None:
        asyncio.get_running_loop().stop()
        await loops.atake_turns()

    async def go_on() -> None:
        await loops.atake_turns()

    first = asyncio.new_event_loop()
    ending = first.create_task(end())
    first.run_forever()
    first.close()
    assert ending.done()
    stale = loops._turn.since
    assert stale is not None
    wait_for(lambda: time.monotonic() > stale + TURN)
    asyncio.run(go_on())
    assert loops._turn.since is None


def test_no_two_tasks_hold_a_key(store: LockStore) -> None:
    inside: Counter[int] = Counter()
    most: Counter[int] = Counter()
    at_once = 0

    async def work(number: int) -> None:
        nonlocal at_once
        key = number % KEYS
        async with lock(f"key {key}", timeout=60):
            inside[key] += 1
            most[key] = max(most[key], inside[key])
            at_once = max(at_once, inside.total())
            await asyncio.sleep(0)
            inside[key] -= 1

    async def main() -> list[float]:
        async with lock("warm"):
            pass
        async with gaps() as seen:
            tasks = []
            for number in range(TASKS):
                tasks.append(asyncio.create_task(work(number)))
                if number % 20 == 0:  # the start of hundreds in one turn of the loop is its caller's time
                    await asyncio.sleep(0)
            await asyncio.gather(*tasks)
        return seen

    # Another process on this machine may take the loop's time: what is there in each of several runs is our doing.
    with unmeasured():
        attempts = [max(asyncio.run(main())) for _ in range(6)]
    assert min(attempts) <= 0.02
    assert len(most) == KEYS
    assert set(most.values()) == {1}
    assert at_once > 1
    assert store.sessions() <= 4


def test_cancelled_tasks_leave_nothing(store: LockStore, rival: Rival) -> None:
    stop = threading.Event()

    def hold_and_let_go() -> None:
        chance = random.Random(3)
        while not stop.is_set():
            rival.hold("one")
            stop.wait(chance.uniform(0, 0.004))
            rival.let_go()

    async def work() -> None:
        while True:
            async with lock("one", timeout=None):
                await asyncio.sleep(0)

    async def main() -> int:
        chance = random.Random(5)
        cancelled = 0
        for _ in range(CANCELLATIONS):
            task = asyncio.create_task(work())
            await asyncio.sleep(chance.uniform(0.0001, 0.008))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled += 1
        return cancelled

    granting = threading.Thread(target=hold_and_let_go)
    granting.start()
    try:
        assert asyncio.run(main()) == CANCELLATIONS
    finally:
        stop.set()
        granting.join()
    wait_for(lambda: store.rows() == 0, 1.0)
    assert rival.is_free("one")


def test_a_second_cancellation_does_not_stop_the_clean_up(store: LockStore, rival: Rival) -> None:
    rival.hold("one")

    async def main() -> None:
        task = asyncio.create_task(lock("one", timeout=None).aacquire())
        await asyncio.to_thread(wait_for, lambda: store.waiting() == 1)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_for(lambda: store.rows() == 1, 1.0)  # the rival's


def test_a_task_and_a_thread_exclude_each_other(store: LockStore) -> None:
    async def main() -> None:
        async with lock("one"):
            with pytest.raises(LockAcquireTimeout, match="task 'holder' of this process"):
                await asyncio.to_thread(lock("one", timeout=0).acquire)
            assert store.rows() == 1
        held = await asyncio.to_thread(lock("one").acquire)
        with pytest.raises(LockAcquireTimeout, match="thread"):
            await lock("one", timeout=0.05).aacquire()
        await asyncio.to_thread(held.release)

    async def named() -> None:
        await asyncio.create_task(main(), name="holder")

    asyncio.run(named())


@pytest.mark.parametrize("outer", ["nothing", "a lock", "a released lock"])
def test_tasks_whose_synchronous_parts_share_a_thread_exclude_each_other(outer: str) -> None:
    """As in Django's async views: sync_to_async runs them all in one thread, and a task's parts one by one."""
    inside: list[int] = []

    def enter_twice() -> HeldLock:
        with lock("one", timeout=0), lock("one", timeout=0):
            return lock("one", timeout=0).acquire()

    async def work(number: int) -> bool:
        try:
            held = await sync_to_async(enter_twice)()
        except LockAcquireTimeout:
            return False
        inside.append(number)
        await asyncio.sleep(0.01)
        child = asyncio.create_task(work(number + 100))
        assert not await child
        with pytest.raises(LockAcquireTimeout, match="thread"):  # another part, which may be anybody's
            await sync_to_async(enter_twice)()
        assert inside == [number]
        inside.clear()
        await sync_to_async(held.release)()
        return True

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(number) for number in range(5)))

    if outer == "nothing":
        assert asyncio.run(main()).count(True) == 1
    else:
        with lock("outer") as held:
            if outer == "a released lock":
                held.release()
            assert asyncio.run(main()).count(True) == 1
    assert asyncio.run(main()).count(True) == 1


def test_a_session_is_opened_while_the_threads_of_the_loop_are_busy() -> None:
    free = threading.Event()

    async def main() -> bool:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, free.wait, 5)
        try:
            async with lock("one", timeout=0):
                return not busy.done()
        finally:
            free.set()
            await busy

    close_idle_sessions()
    assert asyncio.run(main())


def test_a_task_of_a_closed_loop_is_in_nobodys_way() -> None:
    """Its loop was closed without cancelling it, so it never leaves the queue by itself."""
    tasks: list[asyncio.Task[object]] = []

    async def queue() -> None:
        tasks.extend(asyncio.create_task(lock("one", timeout=None).aacquire()) for _ in range(2))
        await asyncio.sleep(0)

    held = lock("one").acquire()
    for closed_by in ("the queue", "the asker"):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(queue())
        if closed_by == "the asker":
            held.release()
        loop.close()
        if closed_by == "the queue":
            held.release()
            held = lock("one", timeout=1).acquire()
    lock("one", timeout=1).acquire().release()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own warning


def test_a_lock_is_released_in_the_way_that_it_was_acquired() -> None:
    async def main() -> None:
        ours, theirs = await lock("one").aacquire(), lock("two").acquire()
        with pytest.raises(ConfigurationError, match=r"'one' was not acquired by acquire.*`await held.arelease\(\)`"):
            ours.release()
        with pytest.raises(ConfigurationError, match=r"'two' was not acquired by aacquire.*`held.release\(\)`"):
            await theirs.arelease()
        assert_locked("one", "two")
        await ours.arelease()
        theirs.release()

    asyncio.run(main())


def test_jobs_that_share_a_thread_exclude_each_other() -> None:
    """A lock that a job has left behind is no reason to let the next job in."""
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(contextvars.copy_context().run, lock("one").acquire).result()
        with pytest.raises(LockAcquireTimeout, match="thread 'ThreadPoolExecutor"):
            pool.submit(contextvars.copy_context().run, lock("one", timeout=0).acquire).result()
        held.release()


def test_a_thread_that_lends_itself_to_a_coroutine_goes_on_as_before() -> None:
    """async_to_sync runs the synchronous parts of what it calls in the calling thread; they are the coroutine's."""

    def inner() -> None:
        with lock("two", timeout=0), lock("two", timeout=0):
            pass
        with pytest.raises(LockAcquireTimeout, match="thread 'lender'"):
            lock("one", timeout=0).acquire()

    def outer() -> None:
        with lock("one"):
            async_to_sync(sync_to_async(inner))()
            with lock("one", timeout=0):
                ended.append(True)

    ended: list[bool] = []
    lender = threading.Thread(target=outer, name="lender")
    lender.start()
    lender.join()
    assert ended == [True]


def test_a_child_task_is_another_owner() -> None:
    async def child() -> None:
        with pytest.raises(LockAcquireTimeout):
            await lock("one", timeout=0).aacquire()

    async def main() -> None:
        async with lock("one") as held, lock("one", timeout=0):
            assert current_lock() is not None
            assert_locked("one")
            await asyncio.create_task(child())
        with pytest.raises(LockNotHeld):
            held.check()
        with pytest.raises(LockNotHeld):
            assert_locked()

    asyncio.run(main())


def test_a_lock_of_one_loop_is_free_in_the_next(store: LockStore) -> None:
    """One session serves one loop after the other."""

    async def main() -> None:
        async with lock("one", timeout=0):
            assert store.sessions() == 1

    for _ in range(3):
        asyncio.run(main())


def test_a_transaction_in_a_task_is_no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Django forbids it, unless it is told not to, as in a notebook."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")

    async def main() -> None:
        with transaction.atomic():
            connection.ensure_connection()
            with pytest.raises(LockInTransaction, match="async with"):
                await lock("one").aacquire()
        connection.close()

    asyncio.run(main())


def test_a_release_inside_the_block(rival: Rival) -> None:
    async def main() -> None:
        async with lock("one") as held:
            await held.arelease()
            assert rival.is_free("one")
        configure(enabled=False)
        async with lock("one"):
            assert rival.is_free("one")

    asyncio.run(main())


def test_a_clean_up_that_is_cancelled_itself_says_so() -> None:
    """As when the event loop ends."""

    def endless() -> Steps[None]:
        yield GateWait(gate_for(asyncio.get_running_loop()), None)

    async def main() -> None:
        cleaning = asyncio.create_task(finish(endless()))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), cleaning}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cleaning

    asyncio.run(main())


# The decorator.


def test_a_coroutine_function_is_guarded(rival: Rival) -> None:
    @concurrency_safe(key="stock:{sku}", timeout=0)
    async def buy(sku: str, amount: int = 1) -> str:
        assert_locked(f"stock:{sku}")
        await asyncio.sleep(0)
        assert not rival.try_hold(f"stock:{sku}")
        return f"{amount} of {sku}"

    assert asyncio.iscoroutinefunction(buy)
    assert asyncio.run(buy("a")) == "1 of a"
    rival.hold("stock:a")
    with pytest.raises(LockAcquireTimeout):
        asyncio.run(buy("a"))
    assert asyncio.run(buy("b", amount=2)) == "2 of b"


def test_the_policies_of_a_coroutine_function(rival: Rival) -> None:
    async def busy(sku: str) -> str:
        await asyncio.sleep(0)
        return f"{sku} is busy"

    async def buy(sku: str) -> str:
        raise AssertionError(sku)

    def told(conflict: LockAcquireTimeout, sku: str) -> str:
        return f"{sku}: {conflict.key}"

    rival.hold("stock:a")
    results: dict[Any, Any] = {"skip": None, busy: "a is busy", Call(told, pass_conflict=True): "a: stock:a"}
    for policy, result in results.items():
        assert asyncio.run(Guard("stock:{sku}", timeout=0, on_conflict=policy).arun(buy, "a")) == result

    async def conflict_inside(sku: str) -> None:
        await lock("stock:a", timeout=0).aacquire()

    with pytest.raises(LockAcquireTimeout):
        asyncio.run(Guard("other:{sku}", on_conflict="skip").arun(conflict_inside, "a"))


def test_what_would_run_after_the_release_is_refused() -> None:
    async def buy(sku: str) -> str:
        return sku

    def hidden(sku: str) -> Awaitable[str]:
        return buy(sku)

    with pytest.raises(ConfigurationError, match="arun"):
        Guard("k").run(buy, "a").close()
    with pytest.raises(ConfigurationError, match="returned a coroutine"):
        Guard("k").run(hidden, "a")


def test_an_async_view(rival: Rival) -> None:
    @concurrency_safe(key=lambda request, sku: f"stock:{sku}", timeout=0)  # noqa: ARG005 - a view's arguments
    async def view(request: HttpRequest, sku: str) -> HttpResponse:
        assert not await sync_to_async(rival.try_hold)(f"stock:{sku}")
        return HttpResponse(sku)

    async def main() -> HttpResponse:
        return await view(AsyncRequestFactory().get("/"), "a")

    assert asyncio.run(main()).content == b"a"


# Loss.


def test_a_loss_can_cancel_the_task(store: LockStore) -> None:
    async def body() -> None:
        async with lock("one") as held:
            task = asyncio.current_task()
            assert task is not None
            held.on_lost(lambda _: task.cancel())
            store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
            await asyncio.sleep(10)

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError) as caught:
            await body()
        if hasattr(caught.value, "__notes__"):
            assert "was lost" in caught.value.__notes__[0]

    asyncio.run(main())


def test_a_loss_is_told_at_the_end(store: LockStore) -> None:
    configure(on_lost="log")

    async def body() -> None:
        async with lock("one"):
            store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")

    asyncio.run(body())
    configure(on_lost="raise")
    with pytest.raises(LockLost):
        asyncio.run(body())
