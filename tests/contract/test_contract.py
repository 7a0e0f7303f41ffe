"""One list of cases, over every scope and store, by threads and by asyncio tasks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest

from concurrency_safe import (
    ConfigurationError,
    HeldLock,
    LockAcquireTimeout,
    LockLost,
    LockNotHeld,
    LockReentrancyError,
    configure,
    spaces,
)
from concurrency_safe.core.keys import lock_key, slot_numbers
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.memory import MemoryBackend
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.sql import CREATE_FENCE
from concurrency_safe.testing import PostgresServer
from tests.contract.worlds import Actor, Interrupt, TaskActor, ThreadActor, TransactionActor, World
from tests.integration.conftest import db_name, dsn, fresh_library
from tests.servers.pgbouncer import PgBouncer

__all__ = ["db_name", "dsn", "fresh_library"]  # fixtures

Case = Callable[[World], Awaitable[None]]

WORLDS: dict[str, tuple[Callable[[World], Actor], str]] = {
    "session, threads": (ThreadActor, "session"),
    "session, tasks": (TaskActor, "session"),
    "transaction, threads": (TransactionActor, "transaction"),
    "pooler, threads": (ThreadActor, "pooler"),
    "pooler, tasks": (TaskActor, "pooler"),
    "memory, threads": (ThreadActor, "memory"),
    "memory, tasks": (TaskActor, "memory"),
}


async def until(fact: Callable[[], object], limit: float = 15.0) -> None:
    """Wait for a fact, while the tasks run."""
    end = time.monotonic() + limit
    while not fact():
        assert time.monotonic() < end, f"not seen within {limit} s"
        await asyncio.sleep(0.002)


async def queued(world: World, key: str, number: int) -> None:
    """Wait until `number` of our actors stand in the queue for `key`, here or in the server."""

    def count() -> int:
        claims = [space.claims for space in spaces._spaces.values()]
        backend = world.options({}).get("backend")
        if backend is not None:
            claims.append(spaces._own_claims[backend])
        return world.rows(waiting=True) + sum(one.waiting(lock_key(key)) for one in claims)

    await until(lambda: count() >= number)


async def one_holder(world: World) -> None:
    one, two = world.actor(), world.actor()
    held = await one.acquire("k")
    held.check()
    assert held.keys == ("k",)
    with pytest.raises(LockAcquireTimeout) as caught:
        await two.acquire("k", timeout=0)
    assert caught.value.key == "k"
    assert caught.value.timeout == 0
    other = await two.acquire("another")
    await two.release(other)
    await one.release(held)
    assert not held.is_active
    await two.release(await two.acquire("k", timeout=0))


async def a_wait_ends_at_its_timeout(world: World) -> None:
    one, two = world.actor(), world.actor()
    held = await one.acquire("k")
    with pytest.raises(LockAcquireTimeout) as caught:
        await two.acquire("k", timeout=0.2)
    assert caught.value.waited is not None
    assert caught.value.waited >= 0.2
    await one.release(held)
    await two.release(await two.acquire("k", timeout=0))


async def first_come_first_served(world: World) -> None:
    holder, *waiters = [world.actor() for _ in range(4)]
    order: list[int] = []

    async def work(number: int, actor: Actor) -> None:
        held = await actor.acquire("k", timeout=None)
        order.append(number)
        await actor.release(held)

    held = await holder.acquire("k")
    tasks = []
    for number, actor in enumerate(waiters):
        tasks.append(asyncio.create_task(work(number, actor)))
        await queued(world, "k", number + 1)
    await holder.release(held)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]


async def the_owner_enters_again(world: World) -> None:
    one, two = world.actor(), world.actor()
    outer = await one.acquire("k")
    inner = await one.acquire("k", timeout=0)
    await one.release(inner)
    with pytest.raises(LockAcquireTimeout):
        await two.acquire("k", timeout=0)
    await one.release(outer)
    await two.release(await two.acquire("k", timeout=0))


async def out_of_order(world: World) -> None:
    """Release the outer acquisition first: the inner one keeps the lock."""
    one, two = world.actor(), world.actor()
    outer = await one.acquire("k")
    inner = await one.acquire("k", "l", timeout=0)
    await one.release(outer)
    for key in ("k", "l"):
        with pytest.raises(LockAcquireTimeout):
            await two.acquire(key, timeout=0)
    await one.release(inner)
    await two.release(await two.acquire("k", "l", timeout=0))


async def readers_together_writers_alone(world: World) -> None:
    one, two, writer = (world.actor() for _ in range(3))
    first = await one.acquire("k", shared=True)
    second = await two.acquire("k", shared=True, timeout=1)
    with pytest.raises(LockAcquireTimeout):
        await writer.acquire("k", timeout=0)
    await one.release(first)
    with pytest.raises(LockAcquireTimeout):
        await writer.acquire("k", timeout=0)
    await two.release(second)
    held = await writer.acquire("k", timeout=1)
    with pytest.raises(LockAcquireTimeout):
        await one.acquire("k", shared=True, timeout=0)
    await writer.release(held)


async def a_writer_is_not_starved(world: World) -> None:
    reader, late, writer = (world.actor() for _ in range(3))
    reading = await reader.acquire("k", shared=True)
    writing = asyncio.create_task(writer.acquire("k", timeout=None))
    await queued(world, "k", 1)
    with pytest.raises(LockAcquireTimeout):
        await late.acquire("k", shared=True, timeout=0)
    await reader.release(reading)
    await writer.release(await writing)
    await late.release(await late.acquire("k", shared=True, timeout=1))


async def no_change_of_mode(world: World) -> None:
    one = world.actor()
    held = await one.acquire("k", shared=True)
    if world.is_transaction:
        pytest.skip("the server itself holds both modes for one transaction")
    with pytest.raises(LockReentrancyError, match="shared"):
        await one.acquire("k", timeout=0)
    await one.release(held)
    held = await one.acquire("k")
    with pytest.raises(LockReentrancyError, match="exclusive"):
        await one.acquire("k", shared=True, timeout=0)
    await one.release(held)


async def all_or_none(world: World) -> None:
    one, two = world.actor(), world.actor()
    held = await one.acquire("b")
    for timeout in (0, 0.1):
        with pytest.raises(LockAcquireTimeout):
            await two.acquire("a", "b", "c", timeout=timeout)
        await one.release(await one.acquire("a", "c", timeout=0))
    await one.release(held)
    every = await two.acquire("a", "b", "c", "a", timeout=1)
    assert every.keys == ("a", "b", "c")
    for key in "abc":
        with pytest.raises(LockAcquireTimeout):
            await one.acquire(key, timeout=0)
    await two.release(every)
    await one.release(await one.acquire("c", "b", "a", timeout=0))


async def opposite_orders(world: World) -> None:
    async def work(seed: int) -> None:
        actor = world.actor()
        chance = random.Random(seed)
        for _ in range(20):
            keys = chance.sample("abcd", 3)
            held = await actor.acquire(*keys, timeout=20)
            await actor.release(held)

    await asyncio.gather(*(work(seed) for seed in range(4)))


async def at_most_so_many(world: World) -> None:
    one, two, three, four = (world.actor() for _ in range(4))
    if not world.has_slots:
        with pytest.raises(ConfigurationError, match="slots=3"):
            await one.acquire("gpu", slots=3)
        return
    first, second, third = [await actor.acquire("gpu", slots=3, timeout=1) for actor in (one, two, three)]
    with pytest.raises(LockAcquireTimeout):
        await four.acquire("gpu", slots=3, timeout=0)
    with pytest.raises(LockAcquireTimeout):
        await four.acquire("gpu", slots=3, timeout=0.1)
    waiting = asyncio.create_task(four.acquire("gpu", slots=3, timeout=10))
    await queued(world, "gpu", 1)
    await two.release(second)
    fourth = await waiting
    for actor in (one, two):  # the one holds a slot already
        for slots in (1, 4):
            with pytest.raises(ConfigurationError, match=rf"slots={slots}.*slots=3"):
                await actor.acquire("gpu", slots=slots, timeout=0)
    for actor, held in ((one, first), (three, third), (four, fourth)):
        await actor.release(held)


async def a_part_is_no_text(world: World) -> None:
    one, two = world.actor(), world.actor()
    held = await one.acquire(("stock", "a"))
    await two.release(await two.acquire("(stock/a)", timeout=0))
    with pytest.raises(LockAcquireTimeout):
        await two.acquire(("stock", "a"), timeout=0)
    await one.release(held)


async def tokens_rise(world: World) -> None:
    one, two = world.actor(), world.actor()
    last = 0
    for actor in (one, two, one):
        held = await actor.acquire("k", timeout=1)
        assert held.token is not None
        assert held.token > last
        last = held.token
        await actor.release(held)
    held = await one.acquire("k")
    waiting = asyncio.create_task(two.acquire("k", timeout=None))
    await queued(world, "k", 1)
    assert held.token is not None
    last = held.token
    await one.release(held)
    next_ = await waiting
    assert next_.token is not None
    assert next_.token > last
    await two.release(next_)
    if world.has_slots:
        held = await one.acquire("two", slots=2)
        assert held.token is not None
        assert held.token > next_.token
        await one.release(held)
    held = await one.acquire("x", "y")
    assert held.token is not None
    assert held.token > next_.token
    await one.release(held)


async def a_long_queue_is_not_joined(world: World) -> None:
    one, two, three = (world.actor() for _ in range(3))
    held = await one.acquire("k")
    waiting = asyncio.create_task(two.acquire("k", timeout=None, max_waiters=1))
    await queued(world, "k", 1)
    for most in (0, 1):
        with pytest.raises(LockAcquireTimeout, match=f"max_waiters={most}"):
            await three.acquire("k", timeout=None, max_waiters=most)
    await one.release(await one.acquire("k", timeout=0, max_waiters=0))  # its owner has not to wait
    await one.release(held)
    held = await waiting
    with pytest.raises(LockAcquireTimeout, match=r"(0 wait for it already )?\(max_waiters=0\)"):
        await three.acquire("k", timeout=None, max_waiters=0)
    await two.release(held)


async def what_is_released_is_not_held(world: World) -> None:
    one = world.actor()
    held = await one.acquire("k")
    held.check()
    await one.release(held)
    with pytest.raises(LockNotHeld):
        await one.release(held)
    with pytest.raises(LockNotHeld):
        held.check()


async def an_interrupt_in_the_wait_leaves_nothing(world: World) -> None:
    one, two, three = (world.actor() for _ in range(3))
    held = await one.acquire("k")
    waiting = asyncio.create_task(two.acquire("k", "l", timeout=None))
    await queued(world, "k", 1)
    two.interrupt()
    with pytest.raises(Interrupt):
        await waiting
    await one.release(held)
    await three.release(await three.acquire("k", "l", timeout=0))


async def a_loss_is_told(world: World) -> None:
    one = world.actor()
    held = await one.acquire("k")
    told: list[HeldLock] = []
    held.on_lost(told.append)
    held.check()
    world.cut()
    # In transaction scope nobody watches: who asks, is told.
    await until(lambda: told or (world.is_transaction and held.is_lost))
    assert told == [held]
    assert held.is_lost
    with pytest.raises(LockLost):
        held.check()
    with pytest.raises(LockLost):
        await one.release(held)


async def another_host_holds_it(world: World) -> None:
    if world.is_memory:
        return
    one, stranger = world.actor(), world.stranger()
    pid = stranger.info.backend_pid
    for keys in (("k",), ("k", "l")):
        stranger.execute("SELECT pg_advisory_lock(%s)", [lock_key("k").number])
        for timeout in (0, 0.1):
            with pytest.raises(LockAcquireTimeout) as caught:
                await one.acquire(*keys, timeout=timeout)
            assert str(pid) in (caught.value.holder or "")
        waiting = asyncio.create_task(one.acquire(*keys, timeout=10))
        await until(lambda: world.rows(waiting=True) == 1)
        stranger.execute("SELECT pg_advisory_unlock_all()")
        await one.release(await waiting)
        stranger.execute("SELECT pg_advisory_lock(%s)", [lock_key("k").number])
        waiting = asyncio.create_task(one.acquire(*keys, timeout=None))
        await until(lambda: world.rows(waiting=True) == 1)
        one.interrupt()
        with pytest.raises(Interrupt):
            await waiting
        await until(lambda: world.rows() == 1, 2)
        stranger.execute("SELECT pg_advisory_unlock_all()")


async def others_queue_on_other_hosts(world: World) -> None:
    if world.is_memory:
        return
    one, holder, waiter = world.actor(), world.stranger(), world.stranger()
    holder.execute("SELECT pg_advisory_lock(%s)", [lock_key("k").number])
    queued_ = asyncio.create_task(
        asyncio.to_thread(waiter.execute, "SELECT pg_advisory_lock(%s)", [lock_key("k").number])
    )
    await until(lambda: world.rows(waiting=True) == 1)
    with pytest.raises(LockAcquireTimeout, match=r"1 wait for it already \(max_waiters=1\)"):
        await one.acquire("k", timeout=None, max_waiters=1)
    with pytest.raises(LockAcquireTimeout, match="gave up"):
        await one.acquire("k", timeout=0.1, max_waiters=2)
    holder.execute("SELECT pg_advisory_unlock_all()")
    await queued_
    waiter.execute("SELECT pg_advisory_unlock_all()")


async def other_hosts_have_the_slots(world: World) -> None:
    if world.is_memory or not world.has_slots:
        return
    one, stranger = world.actor(), world.stranger()
    gate, *slots = slot_numbers(lock_key("outside"), 2)
    for taken in ([gate], slots):
        stranger.execute("SELECT pg_advisory_lock(n) FROM unnest(%s::bigint[]) n", [taken])
        for timeout in (0, 0.1):
            with pytest.raises(LockAcquireTimeout):
                await one.acquire("outside", slots=2, timeout=timeout)
        await until(lambda taken=taken: world.rows() == len(taken), 2)  # type: ignore[misc]  # binds the loop variable
        waiting = asyncio.create_task(one.acquire("outside", slots=2, timeout=None))
        await until(lambda taken=taken: world.rows() > len(taken))  # type: ignore[misc]  # see above
        stranger.execute("SELECT pg_advisory_unlock_all()")
        await one.release(await waiting)


CASES: list[Case] = [
    another_host_holds_it,
    others_queue_on_other_hosts,
    other_hosts_have_the_slots,
    one_holder,
    a_wait_ends_at_its_timeout,
    first_come_first_served,
    the_owner_enters_again,
    out_of_order,
    readers_together_writers_alone,
    a_writer_is_not_starved,
    no_change_of_mode,
    all_or_none,
    opposite_orders,
    at_most_so_many,
    a_part_is_no_text,
    tokens_rise,
    a_long_queue_is_not_joined,
    what_is_released_is_not_held,
    an_interrupt_in_the_wait_leaves_nothing,
    a_loss_is_told,
]


@pytest.fixture(scope="module")
def pooler() -> Iterator[PgBouncer]:
    with PostgresServer() as server, PgBouncer(server, {"default_pool_size": "20"}) as bouncer:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(CREATE_FENCE)
        yield bouncer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", WORLDS)
def test_contract(name: str, case: Case, dsn: str, pooler: PgBouncer) -> None:
    actor, kind = WORLDS[name]
    fixed: dict[str, Any] = {}
    configure(fencing=True)
    if kind == "pooler":
        fixed["backend"] = PostgresBackend(pooler.dsn, StoreOptions(fencing=True, pooled=True))
        dsn = pooler.postgres.dsn
    elif kind == "memory":
        fixed["backend"] = MemoryBackend()

    async def run() -> None:
        world = World(actor, dsn, **fixed)
        try:
            await asyncio.wait_for(case(world), 40)
            await until(lambda: world.rows() == 0, 2)
        finally:
            await world.close()

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CREATE_FENCE)
    asyncio.run(run())
