"""Releases, turns and forgotten locks at the worst moment: nobody enters what is being released, and nobody starves."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest

from concurrency_safe import HeldLock, configure, lock
from concurrency_safe.core.sessions import Request, StoreOptions
from concurrency_safe.locks import _kept
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres import pool as pools
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.spaces import space_for
from tests.integration.conftest import LIMIT, LockStore, Rival, wait_for


@pytest.fixture
def backend(dsn: str) -> Iterator[PostgresBackend]:
    one = PostgresBackend(dsn, StoreOptions(pool_size=1))
    yield one
    one.close()


def test_nobody_enters_again_what_another_thread_is_releasing(backend: PostgresBackend, rival: Rival) -> None:
    held = lock("one", backend=backend).acquire()
    session = held._footing.claims[0].session
    session.wire.is_brisk = False
    releasing = held._give_up()
    next(releasing)  # the statement is under way
    entered = threading.Thread(target=lambda: finish(releasing))

    again = lock("one", backend=backend, timeout=LIMIT)
    entered.start()
    with again:
        entered.join()
        assert not rival.try_hold("one")
    assert rival.is_free("one")
    held._leave_context()


def finish(steps: object) -> None:
    """Go on with a release that waits for its answer."""
    while True:
        try:
            steps.send(True)  # type: ignore[attr-defined]
        except StopIteration:
            return


def test_nobody_enters_again_what_another_task_is_releasing(dsn: str, rival: Rival) -> None:
    async def go() -> None:
        held = await lock("one").aacquire()
        held._footing.claims[0].session.wire.is_brisk = False
        releasing = asyncio.create_task(held.arelease())
        await asyncio.sleep(0)  # it has begun
        async with lock("one") as again:
            await releasing
            again.check()
            assert not await asyncio.to_thread(rival.try_hold, "one")

    asyncio.run(go())
    assert rival.is_free("one")


def test_who_waits_for_a_session_gets_it_from_those_who_come_again_and_again(dsn: str) -> None:
    configure(pool_size=1)
    over = threading.Event()
    turns = [0] * 12

    def work(number: int) -> None:
        while not over.is_set():
            with lock(f"key-{number}", timeout=None):
                turns[number] += 1

    crew = [threading.Thread(target=work, args=(number,)) for number in range(len(turns))]
    for one in crew:
        one.start()
    try:
        wait_for(lambda: sum(turns) > 5000)
        assert min(turns) > 50, turns
    finally:
        over.set()
        for one in crew:
            one.join()


def test_a_turn_is_handed_to_nobody_whose_loop_stands_still(backend: PostgresBackend) -> None:
    first, asleep = Footing(None), Footing(None, asyncio.new_event_loop())
    session = drive(backend.pool.lend(first, (1,), "", empty=False))
    backend.pool._queue[asleep] = (session, (), "", 0.0)

    drive(backend.pool.free(first))

    assert session.user is None
    del backend.pool._queue[asleep]
    assert asleep.home is not None
    asleep.home.close()


def test_a_turn_that_was_handed_over_ends_with_whoever_is_interrupted(
    backend: PostgresBackend, store: LockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE", -1.0)
    first, second = Footing(None), Footing(None)
    session = drive(backend.pool.lend(first, (1,), "", empty=False))
    acquiring = backend.acquire(second, Request(()), [])
    waiting = backend.pool.lend(second, (2,), "", empty=False)
    next(waiting)
    drive(backend.pool.free(first))
    assert session.user is second

    with pytest.raises(KeyboardInterrupt):
        waiting.throw(KeyboardInterrupt)
    acquiring.close()
    drive(backend.undo(second, ()))

    assert session.user is None
    assert session.dead
    wait_for(lambda: store.sessions() == 0)


@pytest.mark.parametrize("place", ["claims", "sessions"])
def test_a_lock_that_the_collector_finds_amid_a_change_is_released_after_it(dsn: str, rival: Rival, place: str) -> None:
    kept: list[HeldLock] = [lock("forgotten").acquire()]
    with lock("other"):
        pass
    footing = kept[0]._footing
    mutex = footing.backend.pool.mutex if place == "sessions" else footing.ownership._mutex  # type: ignore[union-attr]
    _kept.discard(kept[0])

    with mutex:
        kept.clear()
        gc.collect()
        assert not rival.is_free("forgotten")

    wait_for(lambda: rival.is_free("forgotten"))
    with lock("forgotten"):
        pass
