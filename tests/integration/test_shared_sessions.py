"""Locks that share a session: what goes wrong with one of them leaves the others as they were, or tells them."""

from __future__ import annotations

import _thread
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from concurrency_safe import HeldLock, LockAcquireTimeout, LockLost, LockUnavailable, instrumentation, lock, threads
from concurrency_safe.core.events import LockEvent
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import Request, StoreOptions
from concurrency_safe.core.steps import Steps, Wait
from concurrency_safe.locks import _kept
from concurrency_safe.memory import MemoryBackend
from concurrency_safe.ownership import Claim, Footing, Owner
from concurrency_safe.postgres import pool as pools
from concurrency_safe.postgres import session as sessions
from concurrency_safe.postgres import watch as watchers
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.protocol import ServerGoneError
from concurrency_safe.postgres.session import LockSession
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore, Rival, wait_for
from tests.servers.wire import Fault, Wire, cut, nonsense

T = TypeVar("T")


@pytest.fixture
def wire(dsn: str) -> Iterator[Wire]:
    one = Wire(dsn)
    yield one
    one.close()


@pytest.fixture
def backend(wire: Wire) -> Iterator[PostgresBackend]:
    one = PostgresBackend(wire.dsn, StoreOptions())
    yield one
    one.close()


def session_of(held: HeldLock) -> LockSession:
    session = held._footing.claims[0].session
    assert isinstance(session, LockSession)
    return session


@contextlib.contextmanager
def silent(session: LockSession) -> Iterator[None]:
    """Let the server not answer: whoever asks has to wait."""
    os.kill(session.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(session.pid, signal.SIGCONT)


def going_on(steps: Steps[T]) -> Steps[T]:
    """Go on with a rule that has waited once."""
    came = True
    while True:
        try:
            want: Wait = steps.send(came)
        except StopIteration as stop:
            result: T = stop.value
            return result
        came = yield want


def forget(held: list[HeldLock]) -> None:
    """Lose the only reference to a lock, as when an exception hits the first line of `__exit__`."""
    _kept.discard(held[0])
    held.clear()
    gc.collect()


def test_a_release_waits_for_its_turn_on_a_session_in_use(backend: PostgresBackend, rival: Rival) -> None:
    kept = lock("kept", backend=backend).acquire()
    session, user = session_of(kept), Footing(None)
    drive(backend.pool.take(user, session))
    releasing = threading.Thread(target=lambda: drive(kept._give_up()))
    releasing.start()
    wait_for(lambda: len(backend.pool._queue) == 1)
    assert not rival.try_hold("kept")
    drive(backend.pool.free(user))
    releasing.join()
    assert rival.is_free("kept")
    kept._leave_context()


def test_a_release_pays_for_a_lock_that_was_forgotten_meanwhile(backend: PostgresBackend, rival: Rival) -> None:
    kept, held = lock("kept", backend=backend).acquire(), [lock("one", backend=backend).acquire()]
    releasing = kept._give_up()
    with silent(session_of(kept)):
        next(releasing)  # sent, and waits for the answer
    forget(held)
    assert drive(going_on(releasing))
    assert rival.is_free("kept")
    assert rival.is_free("one")
    kept._leave_context()


def test_a_hook_hears_of_an_acquisition_and_of_its_release(backend: PostgresBackend) -> None:
    seen: list[LockEvent] = []
    instrumentation.add_hook(seen.append)
    try:
        with lock("one", backend=backend):
            assert [event.kind for event in seen] == ["acquired"]
    finally:
        instrumentation.remove_hook(seen.append)
    assert [(event.kind, event.keys) for event in seen] == [("acquired", ("one",)), ("released", ("one",))]
    with lock("one", backend=backend):
        pass
    assert len(seen) == 2
    assert seen[0].waited is not None
    assert seen[1].held is not None


def test_an_acquisition_that_is_cut_off_leaves_the_others_on_its_session(
    backend: PostgresBackend, rival: Rival, store: LockStore
) -> None:
    """Stopped as its statement is under way, and granted later: the session is cleaned, not closed."""
    kept = lock("kept", backend=backend).acquire()
    footing = Footing(None)
    footing.backend = backend
    request = Request((lock_key("one"),))
    claim = Claim(request.keys[0], request, Owner(None, None), footing)
    acquiring = backend.acquire(footing, request, [claim])
    with silent(session_of(kept)):
        next(acquiring)  # sent, and waits for the answer
    acquiring.close()
    drive(backend.undo(footing, [claim]))

    assert rival.is_free("one")
    assert not rival.try_hold("kept")
    kept.check()
    assert store.sessions() == 1
    with lock("one", backend=backend):
        assert store.rows() == 2
    kept.release()


def test_a_lock_forgotten_while_its_session_is_in_use_is_paid_for_later(backend: PostgresBackend, rival: Rival) -> None:
    kept = lock("kept", backend=backend).acquire()
    held = [lock("one", backend=backend).acquire()]
    session, user = session_of(kept), Footing(None)
    drive(backend.pool.take(user, session))
    forget(held)
    assert not rival.try_hold("one")
    drive(backend.pool.free(user))
    assert rival.is_free("one")
    kept.release()


@pytest.mark.parametrize("taken", [False, True])
def test_a_lock_forgotten_while_another_is_acquired_is_paid_for(
    backend: PostgresBackend, rival: Rival, *, taken: bool
) -> None:
    """Whatever that acquisition hears; what it was about is not all that its session may owe."""
    kept, held = lock("kept", backend=backend).acquire(), [lock("one", backend=backend).acquire()]
    if taken:
        rival.hold("two")
    footing = Footing(None)
    request = Request((lock_key("two"),), timeout=0)
    claim = Claim(request.keys[0], request, Owner(None, None), footing)
    acquiring = backend.acquire(footing, request, [claim])
    with silent(session_of(kept)):
        next(acquiring)  # sent, and waits for the answer
    forget(held)
    grant = drive(going_on(acquiring))
    assert (grant is None) == taken
    if grant is None:
        drive(backend.conflict(footing, request))
    assert rival.is_free("one")
    drive(backend.undo(footing, [claim]))
    kept.release()


def test_a_session_that_can_not_be_cleaned_is_closed_and_its_owners_are_told(
    backend: PostgresBackend, wire: Wire, rival: Rival
) -> None:
    kept = lock("kept", backend=backend).acquire()
    held = [lock("one", backend=backend).acquire()]
    wire.fail(b"DEALLOCATE", cut)
    forget(held)
    assert kept.is_lost
    with pytest.raises(LockLost):
        kept.release()
    wait_for(lambda: rival.is_free("one") and rival.is_free("kept"))


def test_a_conflict_whose_turn_can_not_end_hides_nothing(backend: PostgresBackend, wire: Wire, rival: Rival) -> None:
    """A lock was forgotten in the middle of it, and its session can't be cleaned."""
    rival.hold("taken")
    kept = lock("kept", backend=backend).acquire()
    session, footing = session_of(kept), Footing(None)
    request = Request((lock_key("taken"),), timeout=0)
    assert (
        drive(backend.acquire(footing, request, [Claim(request.keys[0], request, Owner(None, None), footing)])) is None
    )
    session.debts.add((lock_key("one").number, False))
    wire.fail(b"DEALLOCATE", cut)
    assert str(rival.pid) in (drive(backend.conflict(footing, request)) or "")
    assert kept.is_lost
    with pytest.raises(LockLost):
        kept.release()


def test_a_lock_that_the_server_does_not_know_any_more_is_lost(backend: PostgresBackend) -> None:
    """As when somebody else's pooler shared the session."""
    held = lock("one", backend=backend).acquire()
    session_of(held).pgconn.exec_(b"SELECT pg_advisory_unlock_all()")
    with pytest.raises(LockLost):
        held.release()


def test_a_new_session_that_is_cut_at_once_is_unavailable(backend: PostgresBackend, wire: Wire) -> None:
    wire.fail(b"cs_try", cut)
    with pytest.raises(LockUnavailable), lock("one", backend=backend):
        pytest.fail("the body ran unguarded")


def test_whoever_notices_a_loss_while_entering_again_does_not_enter(backend: PostgresBackend, wire: Wire) -> None:
    held = lock("one", backend=backend).acquire()
    wire.fail(b"cs_try", cut)
    with pytest.raises(LockLost, match="'one, two' was lost"), lock("one", "two", backend=backend):
        pytest.fail("the body ran unguarded")
    with pytest.raises(LockLost, match="'one' was lost"):
        held.release()


def test_a_turn_that_does_not_come_is_unavailable(backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "STALL", 0.1)
    held = lock("one", backend=backend).acquire()
    user, other = Footing(None), Footing(None)
    session = session_of(held)
    drive(backend.pool.take(user, session))
    with pytest.raises(ServerGoneError, match="became free"):
        drive(backend.pool.take(other, session))
    drive(backend.pool.free(user))
    held.release()


def test_a_session_that_was_ended_is_dead(backend: PostgresBackend) -> None:
    held = lock("one", backend=backend).acquire()
    session = session_of(held)
    session.discard()
    assert session.is_dead()
    assert held.is_lost
    with pytest.raises(LockLost):
        held.release()


# Behind a pooler.


@pytest.mark.parametrize("fault", [cut, nonsense])
def test_a_pooler_that_fails_at_once_is_unavailable(wire: Wire, fault: Fault) -> None:
    wire.fail(b"pg_is_in_recovery", fault)
    backend = PostgresBackend(wire.dsn, StoreOptions(pooled=True))
    with pytest.raises(LockUnavailable, match="refused a new session"), lock("one", backend=backend):
        pytest.fail("the body ran unguarded")


def test_a_standby_behind_a_pooler_is_refused() -> None:
    with PostgresServer() as primary, primary.standby() as standby:
        backend = PostgresBackend(standby.dsn, StoreOptions(pooled=True))
        with pytest.raises(LockUnavailable, match="standby"), lock("one", backend=backend):
            pytest.fail("the body ran unguarded")


def test_a_waiter_behind_a_pooler_whom_an_operator_cancels_is_unavailable(
    dsn: str, rival: Rival, store: LockStore
) -> None:
    backend = PostgresBackend(dsn, StoreOptions(pooled=True))
    rival.hold("one")

    def cancel() -> None:
        wait_for(lambda: store.waiting() == 1)
        store.connection.execute("SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted")

    canceling = threading.Thread(target=cancel)
    canceling.start()
    with pytest.raises(LockUnavailable, match="canceling"), lock("one", timeout=None, backend=backend):
        pytest.fail("two holders")
    canceling.join()
    backend.close()


def test_a_session_whose_wait_was_in_vain_knows_its_name(
    backend: PostgresBackend, rival: Rival, store: LockStore
) -> None:
    """The server takes back what a statement that fails has set."""
    kept = lock("kept", backend=backend).acquire()
    rival.hold("taken")
    for _ in range(2):  # on a session of its own, then on the same
        with pytest.raises(LockAcquireTimeout):
            lock("taken", backend=backend, timeout=0.02).acquire()
        said: dict[int, str] = dict(
            store.connection.execute("SELECT pid, application_name FROM pg_stat_activity").fetchall()
        )
        assert len(backend.pool.sessions) == 2
        assert all(one.name in (None, said[one.pid]) for one in backend.pool.sessions)
    kept.release()


# The watcher.


def test_the_watcher_asks_a_quiet_holder_and_nobody_who_is_busy(backend: PostgresBackend) -> None:
    held = lock("one", backend=backend).acquire()
    session, watcher = session_of(held), watchers._watcher
    assert watcher is not None
    before = session.used_at
    watcher.ask(session, backend.pool)
    assert session.used_at > before
    user = Footing(None)
    drive(backend.pool.take(user, session))
    watcher.ask(session, backend.pool)
    watcher.answer(session, backend.pool)
    assert session.user is user
    drive(backend.pool.free(user))
    held.release()


def test_an_event_of_an_earlier_session_ends_no_later_one(backend: PostgresBackend) -> None:
    """Their files may have had the same number, and the watcher hears late."""
    held = lock("one", backend=backend).acquire()
    session, watcher = session_of(held), watchers._watcher
    assert watcher is not None
    watcher.inspect(session.pgconn.socket)
    user = Footing(None)
    drive(backend.pool.take(user, session))
    watcher.inspect(session.pgconn.socket)
    drive(backend.pool.free(user))
    assert not held.is_lost
    held.release()


def test_a_release_whose_turn_does_not_come_is_paid_by_who_is_in_the_way(
    backend: PostgresBackend, store: LockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = lock("one", backend=backend).acquire(), lock("two", backend=backend).acquire()
    user, session = Footing(None), session_of(one)
    drive(backend.pool.take(user, session))
    monkeypatch.setattr(pools, "STALL", 0.01)
    one.release()
    assert store.rows() == 2
    drive(backend.pool.free(user))
    assert store.rows() == 1
    lock("one", timeout=0, backend=backend).acquire().release()
    two.check()
    two.release()


def test_two_releases_of_one_lock_at_once_cost_no_other_lock(backend: PostgresBackend, store: LockStore) -> None:
    one, two = lock("one", backend=backend).acquire(), lock("two", backend=backend).acquire()
    user, session = Footing(None), session_of(one)
    drive(backend.pool.take(user, session))
    ways_out = [one._give_up(), one._give_up()]
    for steps in ways_out:
        next(steps)  # it waits for its turn
    drive(backend.pool.free(user))
    assert [drive(steps) for steps in ways_out] == [True, True]
    one._leave_context()
    assert not two.is_lost
    assert store.rows() == 1
    two.release()


def test_a_second_interrupt_closes_the_session_that_the_first_was_cleaning(
    backend: PostgresBackend, store: LockStore, wire: Wire
) -> None:
    one, two = lock("one", backend=backend).acquire(), lock("two", backend=backend).acquire()
    session, user = session_of(one), Footing(None)
    drive(backend.pool.take(user, session))
    steps = backend.undo(user, one._footing.claims)
    next(steps)  # it waits for the answer
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    assert session.dead
    assert session.user is None
    wait_for(lambda: store.rows() == 0)
    for held in (one, two):
        with pytest.raises(LockLost):
            held.release()


def test_a_session_that_is_cut_while_it_is_cleaned_is_gone(backend: PostgresBackend, wire: Wire) -> None:
    """Its clean-up must not raise anything else: that would hide the interrupt."""
    held = lock("one", backend=backend).acquire()
    session = session_of(held)
    drive(backend.pool.take(Footing(None), session))
    session.pgconn.send_query(b"SELECT pg_sleep(60)")
    steps = session.settle()
    next(steps)
    for link in wire.links:
        link.cut()
    with pytest.raises(ServerGoneError):
        drive(going_on(steps))
    session.dead = True
    with pytest.raises(LockLost):
        held.release()


def test_a_conflict_on_slots_has_the_time_of_any_statement(
    backend: PostgresBackend, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a clean-up after an interrupt, which is short."""
    other = PostgresBackend(dsn, StoreOptions())
    held = [lock("gpu", slots=2, backend=other).acquire()]
    monkeypatch.setattr(sessions, "SETTLE_TIMEOUT", 0.0)
    with ThreadPoolExecutor(1) as pool:
        held.append(pool.submit(lock("gpu", slots=2, backend=other).acquire).result())
    with pytest.raises(LockAcquireTimeout):
        lock("gpu", slots=2, timeout=0.02, backend=backend).acquire()
    for one in held:
        one.release()
    lock("gpu", slots=2, timeout=0, backend=backend).acquire().release()
    other.close()


def test_a_process_that_is_idle_keeps_no_session_past_its_time(dsn: str, store: LockStore) -> None:
    backend = PostgresBackend(dsn, StoreOptions(pool_idle=0.05))
    with lock("one", backend=backend) as held:
        session = session_of(held)
    wait_for(lambda: session.dead)
    wait_for(lambda: store.sessions() == 0)


def test_the_end_that_an_answer_reads_is_told(backend: PostgresBackend, store: LockStore) -> None:
    """It came after the watcher was waked for something else, and it is read once."""
    told: list[HeldLock] = []
    held = lock("one", backend=backend).acquire()
    held.on_lost(told.append)
    session, watcher = session_of(held), watchers._watcher
    assert watcher is not None
    del watcher.sessions[session.pgconn.socket]  # no event wakes it
    watcher.answer(session, backend.pool)
    assert not told
    store.connection.execute("SELECT pg_terminate_backend(%s, 5000)", [session.pid])
    wait_for(lambda: watcher.answer(session, backend.pool) or told)  # type: ignore[func-returns-value]  # None: look again
    assert told == [held]
    with pytest.raises(LockLost):
        held.release()


def test_where_the_system_has_no_epoll_the_watcher_looks(
    backend: PostgresBackend, store: LockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("select.epoll", raising=False)
    looking = watchers._Watcher()
    with lock("one", backend=backend) as held:
        session, watcher = session_of(held), watchers._watcher
    assert watcher is not None
    del watcher.sessions[session.pgconn.socket]  # it is nobody else's to see
    looking.add(session, backend.pool)
    looking.look()
    assert not session.dead
    store.connection.execute("SELECT pg_terminate_backend(%s, 5000)", [session.pid])
    wait_for(lambda: looking.look() or session.dead)  # type: ignore[func-returns-value]  # a look is no answer


@pytest.mark.parametrize("failure", [ZeroDivisionError, SystemExit])
def test_a_watcher_that_fails_goes_on(
    failure: type[BaseException], backend: PostgresBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with lock("one", backend=backend):
        watcher = watchers._watcher
        assert watcher is not None

        def fail() -> LockSession:
            del watcher.sessions[-1]
            raise failure

        for times in (1, 2):
            with caplog.at_level(logging.ERROR):
                watcher.sessions[-1] = (fail, backend.pool)  # type: ignore[assignment]  # stands for a bug of ours
                wait_for(lambda times=times: caplog.text.count("the watcher of lock sessions failed") == times)  # type: ignore[misc]


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_watcher_that_dies_at_birth_is_started_again(
    deaths: int, backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CPython gives an asynchronous exception for a thread to the one that it is starting."""
    born: list[int] = []
    start = _thread.start_new_thread

    def start_or_die(run: Callable[[], None], args: tuple[()]) -> int:
        born.append(1)
        return start(run, args) if len(born) > deaths else start(int, ())

    monkeypatch.setattr(_thread, "start_new_thread", start_or_die)
    monkeypatch.setattr(threads, "START_LIMIT", 0.2)
    monkeypatch.setattr(watchers, "_watcher", None)
    with lock("one", backend=backend):
        watcher = watchers._watcher
        assert watcher is not None
        assert ("does not start" in caplog.text) == (deaths == threads.STARTS)
    if deaths == threads.STARTS:
        assert not watcher.is_running
        watcher.start()
    wait_for(lambda: watcher.is_running)
    watcher.run()  # one thread is enough


def test_a_claim_of_a_forgotten_lock_has_nobody_to_tell() -> None:
    footing = Footing(None)
    footing.lock = lambda: None
    request = Request((lock_key("one"),))
    Claim(request.keys[0], request, Owner(None, None), footing).lose()


def test_memory_has_no_holder_to_name() -> None:
    request = Request((lock_key("one"),))
    assert drive(MemoryBackend().conflict(Footing(None), request)) is None
