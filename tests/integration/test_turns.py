"""Releases, turns and forgotten locks at the worst moment: nobody enters what is being released, and nobody starves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from concurrency_safe import HeldLock, LockCapacityError, LockLost, LockReentrancyError, configure, lock, spaces
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import Borrower, Request, StoreOptions
from concurrency_safe.core.steps import READ, SocketWait
from concurrency_safe.locks import _kept
from concurrency_safe.ownership import Footing, Owner, Ownership
from concurrency_safe.postgres import loop
from concurrency_safe.postgres import pool as pools
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.session import LockSession
from concurrency_safe.postgres.waiting import drive
from tests.integration.conftest import LIMIT, LockStore, Rival, wait_for
from tests.integration.test_shared_sessions import going_on, silent
from tests.servers.wire import Wire, cut


@pytest.fixture
def backend(dsn: str) -> Iterator[PostgresBackend]:
    one = PostgresBackend(dsn, StoreOptions(pool_size=1))
    yield one
    one.close()


def test_nobody_enters_again_what_another_thread_is_releasing(backend: PostgresBackend, rival: Rival) -> None:
    held = lock("one", backend=backend).acquire()
    session = held._footing.claims[0].session
    steps = held._give_up()
    with silent(session):
        next(steps)  # the statement is under way
    releasing = threading.Thread(target=lambda: drive(going_on(steps)))

    releasing.start()
    with lock("one", backend=backend, timeout=LIMIT):
        releasing.join()
        assert not rival.try_hold("one")
    assert rival.is_free("one")
    held._leave_context()


def test_nobody_enters_again_what_another_task_is_releasing(dsn: str, rival: Rival) -> None:
    async def go() -> None:
        held = await lock("one").aacquire()
        with silent(held._footing.claims[0].session):
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


def test_the_watcher_and_a_user_may_both_find_a_session_dead(backend: PostgresBackend, rival: Rival) -> None:
    held = lock("one", backend=backend).acquire()
    told: list[HeldLock] = []
    held.on_lost(told.append)
    session = held._footing.claims[0].session

    for _ in ("watcher", "user"):
        backend.pool.forget(session)
    assert told == [held]
    with pytest.raises(LockLost):
        held.release()
    wait_for(lambda: rival.is_free("one"))
    with lock("one", backend=backend):
        assert backend.pool.sessions != [session]


def waits(backend: PostgresBackend, session: LockSession, footing: Footing) -> None:
    """Let `footing` have waited for `session` for long."""
    backend.pool._queue[footing] = (session, (), "", 0.0)


def test_a_session_is_kept_for_who_has_waited_and_not_for_long(
    backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "KEPT", LIMIT)
    first, waiting, late = Footing(None), Footing(None), Footing(None)
    session = drive(backend.pool.lend(first, (1,), "", empty=False))
    waits(backend, session, waiting)
    drive(backend.pool.free(first))

    assert backend.pool.lend_at_once(late, (2,), "") is None
    assert not backend.pool.take_at_once(late, session)
    assert session.user is None  # nothing is lost where the one that waits is interrupted now
    assert backend.pool.take_at_once(waiting, session)
    del backend.pool._queue[waiting]
    drive(backend.pool.free(waiting))

    for how in ("its time is over", "it has left"):
        waits(backend, session, waiting)
        monkeypatch.setattr(pools, "KEPT", 0.0 if how == "its time is over" else LIMIT)
        backend.pool._kept_at = 0.0
        assert backend.pool.take_at_once(first, session)
        drive(backend.pool.free(first))
        assert session in backend.pool._kept_for
        if how == "it has left":
            del backend.pool._queue[waiting]
        assert backend.pool.lend_at_once(late, (2,), "") is session
        drive(backend.pool.free(late))


@pytest.mark.parametrize("verb", ["lend_at_once", "take_at_once"])
def test_a_signals_handler_may_take_a_lock_while_a_kept_session_is_looked_at(
    backend: PostgresBackend, verb: str
) -> None:
    first, gone, handlers = Footing(None), Footing(None), Footing(None)
    session = drive(backend.pool.lend(first, (1,), "", empty=False))
    drive(backend.pool.free(first))
    backend.pool._kept_for[session] = (gone, 0.0)
    handled: list[object] = []

    def handle(frame: FrameType, event: str, _: object) -> None:
        """As the interpreter does for a signal, when a function begins."""
        if event == "call" and frame.f_code.co_name == "_is_kept_from" and not handled:
            sys.setprofile(None)
            handled.append(backend.pool.lend_at_once(handlers, (2,), ""))
            assert backend.pool.free_at_once(handlers)

    sys.setprofile(handle)
    try:
        is_taken = verb == "take_at_once"
        taken = backend.pool.take_at_once(first, session) if is_taken else backend.pool.lend_at_once(first, (1,), "")
    finally:
        sys.setprofile(None)
    assert handled == [session]
    assert taken
    assert session.user is first
    drive(backend.pool.free(first))


def test_a_refused_acquisition_does_not_keep_the_lock_of_another_thread(dsn: str, rival: Rival) -> None:
    rival.hold("one")
    waiting = lock("one", timeout=LIMIT)
    kept: list[bool] = []

    def work() -> None:
        with waiting:
            kept.append(waiting._held in _kept)

    crew = threading.Thread(target=work)
    crew.start()
    try:
        wait_for(lambda: waiting._held is not None)
        with pytest.raises(LockReentrancyError):
            waiting.acquire()
    finally:
        rival.let_go()
        crew.join()
    assert kept == [False]


@pytest.mark.parametrize("state", ["stopped", "closed"])
def test_no_session_is_kept_for_a_task_whose_loop_stands_still(backend: PostgresBackend, state: str) -> None:
    first, awake, asleep = Footing(None), Footing(None), Footing(None, asyncio.new_event_loop())
    assert asleep.home is not None
    if state == "closed":
        asleep.home.close()
    session = drive(backend.pool.lend(first, (1,), "", empty=False))
    waits(backend, session, asleep)
    waits(backend, session, awake)

    drive(backend.pool.free(first))

    assert backend.pool._kept_for[session][0] is awake
    assert (asleep in backend.pool._queue) == (state == "stopped")
    backend.pool._queue.clear()
    asleep.home.close()


def test_an_interrupt_as_a_wait_for_a_session_ends_leaves_no_place_in_the_queue(backend: PostgresBackend) -> None:
    class Interrupted(set[Borrower]):
        """Is interrupted once, as somebody leaves."""

        hits = 0

        def discard(self, borrower: object) -> None:
            self.hits += 1
            if self.hits == 1:
                raise KeyboardInterrupt
            super().discard(borrower)

    first, second = Footing(None), Footing(None)
    drive(backend.pool.lend(first, (1,), "", empty=False))
    waiting = backend.pool.lend(second, (2,), "", empty=False)
    next(waiting)
    backend.pool._opening = Interrupted({second})
    with pytest.raises(KeyboardInterrupt):
        waiting.close()
    assert second in backend.pool._queue

    drive(backend.undo(second, ()))

    assert backend.pool._queue == {}
    assert backend.pool._opening == set()
    drive(backend.pool.free(first))


def test_two_sessions_are_kept_for_two(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not both for the first, who needs one."""
    monkeypatch.setattr(pools, "PATIENCE", -1.0)
    backend = PostgresBackend(dsn, StoreOptions(pool_size=2))
    users = Footing(None), Footing(None)
    sessions = [drive(backend.pool.lend(user, (1,), "", empty=False)) for user in users]
    first, second = Footing(None), Footing(None)
    for waiting in (first, second):
        backend.pool._queue[waiting] = (None, (2,), "", 0.0)
    for user in users:
        drive(backend.pool.free(user))

    assert [backend.pool._kept_for[one][0] for one in sessions] == [first, second]
    backend.pool._queue.clear()
    backend.close()
    assert backend.pool._kept_for == {}


def test_threads_that_never_rest_leave_no_session_and_no_lock(dsn: str, store: LockStore) -> None:
    over, failed = threading.Event(), list[BaseException]()

    def work(number: int) -> None:
        try:
            while not over.is_set():
                with lock(f"key-{number}", timeout=None):
                    pass
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    crew = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for one in crew:
        one.start()
    over.wait(3)
    over.set()
    for one in crew:
        one.join()

    assert failed == []
    assert store.rows() == 0
    (space,) = [space for space in spaces._spaces.values() if space.backend.pool.sessions]  # type: ignore[attr-defined]
    pool = space.backend.pool  # type: ignore[attr-defined]
    assert [session for session in pool.sessions if session.user or session.held or session.debts] == []
    assert pool._queue == {}
    assert space.claims._held == set()


def test_a_task_of_a_closed_loop_takes_no_part_of_max_held() -> None:
    claims, home = Ownership(1), asyncio.new_event_loop()
    asleep = Footing(None, home)
    assert claims.enter_alone(asleep, Request((lock_key("one"),)), Owner(asleep, None))
    home.close()

    awake = Footing(None)
    assert drive(claims.enter(awake, Request((lock_key("two"),)), Owner(awake, None))) is None


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


def test_threads_that_come_at_once_hold_no_more_than_max_held(dsn: str) -> None:
    configure(max_held=3)
    together, over = threading.Barrier(12), threading.Event()
    held, refused = list[int](), list[int]()

    def work(number: int) -> None:
        together.wait()
        try:
            with lock(f"key-{number}", timeout=LIMIT):
                held.append(number)
                over.wait()
        except LockCapacityError:
            refused.append(number)

    crew = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for one in crew:
        one.start()
    try:
        wait_for(lambda: len(held) + len(refused) == len(crew))
        assert len(held) == 3
    finally:
        over.set()
        for one in crew:
            one.join()


def test_who_waits_in_this_process_counts_when_its_turn_comes(dsn: str) -> None:
    configure(max_held=2)

    def read() -> None:
        with lock("readers", shared=True, timeout=LIMIT):
            pass

    with ThreadPoolExecutor() as pool:
        with lock("readers", shared=True), lock("one"), pytest.raises(LockCapacityError):
            pool.submit(read).result()
        pool.submit(read).result()


def test_a_task_that_ended_without_its_release_is_collected_with_its_lock(rival: Rival, dsn: str) -> None:
    """As when an interrupt hits the first line of `__aexit__`: the task's error knows the frame, and that the lock."""

    class Interrupt(BaseException):
        pass

    async def go() -> None:
        entered = lock("one")
        await entered.__aenter__()
        assert not rival.try_hold("one")
        raise Interrupt

    with contextlib.suppress(Interrupt):
        asyncio.run(go())
    gc.collect()

    wait_for(lambda: rival.is_free("one"))


def test_a_reader_that_an_interrupt_left_in_the_loop_is_nobodys() -> None:
    async def go() -> bool:
        ours, theirs = socket.socketpair()
        gone, also_gone = socket.socketpair()
        asyncio.get_running_loop().add_reader(gone.fileno(), gone.close)
        number = os.dup2(ours.fileno(), gone.fileno())  # the loop doesn't know
        also_gone.close()
        theirs.send(b"!")
        came = await loop._wait(SocketWait(number, READ, time.monotonic() + 1))
        for one in (ours, theirs, gone):
            one.close()
        return came

    assert asyncio.run(go())


def test_a_release_hears_nothing_of_what_its_session_owes_for_others(dsn: str, rival: Rival) -> None:
    wire = Wire(dsn)
    backend = PostgresBackend(wire.dsn, StoreOptions())
    held = lock("one", backend=backend).acquire()
    session = held._footing.claims[0].session
    releasing = held._give_up()
    with silent(session):
        next(releasing)  # sent, and waits for the answer
    session.debts.add((lock_key("forgotten").number, False))
    wire.fail(b"DEALLOCATE", cut)

    assert drive(going_on(releasing))

    assert session.dead
    wait_for(lambda: rival.is_free("one"))
    held._leave_context()
    wire.close()
