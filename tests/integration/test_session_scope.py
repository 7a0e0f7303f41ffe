"""Session scope: acquiring, waiting, conflicts, re-entry, release."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial

import pytest
from django.db import connection

from concurrency_safe import (
    ConfigurationError,
    HeldLock,
    Lock,
    LockAcquireTimeout,
    LockLost,
    LockNotHeld,
    LockReentrancyError,
    LockUnavailable,
    assert_locked,
    concurrency_safe,
    configure,
    current_lock,
    lock,
    locks,
    spaces,
)
from concurrency_safe.memory import MemoryBackend
from tests.integration.conftest import LIMIT, LockStore, Rival, wait_for


def in_thread(body: object) -> threading.Thread:
    thread = threading.Thread(target=body)  # type: ignore[arg-type]
    thread.start()
    return thread


def cut_holders(rival: Rival) -> int:
    """End the sessions that hold a lock; return how many holders are left."""
    rival.connection.execute(
        "SELECT pg_terminate_backend(pid, 15000) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return 0


def test_a_block_holds_the_key_and_frees_it(rival: Rival) -> None:
    with lock("stock:ABC") as held:
        assert not rival.try_hold("stock:ABC")
        assert rival.try_hold("stock:XYZ")
        assert held.keys == ("stock:ABC",)
        assert held.token is None
        assert not held.is_lost

    assert rival.try_hold("stock:ABC")


def test_the_body_error_frees_the_key_and_surfaces(rival: Rival) -> None:
    with pytest.raises(ZeroDivisionError), lock("stock:ABC"):
        _ = 1 / 0

    assert rival.try_hold("stock:ABC")


def test_timeout_zero_tries_once(store: LockStore, rival: Rival) -> None:
    with lock("free", timeout=0) as held:
        assert store.rows() == 1
        assert held.is_active

    rival.hold("taken")
    with pytest.raises(LockAcquireTimeout) as caught, lock("taken", timeout=0):
        pytest.fail("the body ran unguarded")
    assert caught.value.key == "taken"
    assert caught.value.timeout == 0
    assert str(rival.pid) in (caught.value.holder or "")


def test_a_wait_ends_at_its_timeout(store: LockStore, rival: Rival) -> None:
    rival.hold("taken")

    started = time.monotonic()
    with (
        pytest.raises(LockAcquireTimeout, match=r"'taken'.*0\.3") as caught,
        lock("taken", timeout=0.3),
    ):
        pytest.fail("the body ran unguarded")

    assert time.monotonic() - started >= 0.3
    assert caught.value.waited is not None
    assert caught.value.waited >= 0.3
    assert isinstance(caught.value, TimeoutError)
    assert store.waiting() == 0
    assert store.rows() == 1  # the rival's


def test_timeout_none_waits_until_it_is_free(store: LockStore, rival: Rival) -> None:
    rival.hold("taken")
    got: list[HeldLock] = []

    def wait() -> None:
        with lock("taken", timeout=None) as held:
            got.append(held)

    waiter = in_thread(wait)
    wait_for(lambda: store.waiting() == 1)
    assert not got
    rival.let_go()
    waiter.join()

    assert got[0].waited > 0


def test_a_wait_longer_than_max_block_goes_on_in_pieces(store: LockStore, rival: Rival) -> None:
    configure(max_block=0.05)
    rival.hold("taken")
    entered = threading.Event()

    def wait() -> None:
        with lock("taken", timeout=None):
            entered.set()

    waiter = in_thread(wait)
    wait_for(lambda: store.waiting() == 1)
    wait_for(lambda: store.waiting() == 0)  # between two pieces
    wait_for(lambda: store.waiting() == 1)
    assert not entered.is_set()
    rival.let_go()
    waiter.join()

    assert entered.is_set()


def test_threads_of_one_process_exclude_each_other(store: LockStore) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(20):
            with lock("one", timeout=None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [in_thread(work) for _ in range(8)]
    for thread in threads:
        thread.join()

    assert len(most) == 160
    assert max(most) == 1
    assert store.rows() == 0


def test_threads_of_one_process_queue_in_order(store: LockStore) -> None:
    order: list[int] = []
    held = lock("one").acquire()
    claims = held._footing.ownership
    assert claims is not None

    def work(number: int) -> None:
        with lock("one", timeout=None):
            order.append(number)

    threads = []
    for number in range(6):
        threads.append(in_thread(lambda number=number: work(number)))
        wait_for(lambda: claims.waiting(held._keys[0]) == len(threads))
    held.release()
    for thread in threads:
        thread.join()

    assert order == list(range(6))


def test_only_one_thread_of_a_process_stands_in_the_servers_queue(store: LockStore, rival: Rival) -> None:
    rival.hold("one")
    threads = [in_thread(lambda: lock("one", timeout=None).acquire().release()) for _ in range(4)]
    wait_for(lambda: store.waiting() == 1)

    assert store.waiting() == 1
    rival.let_go()
    for thread in threads:
        thread.join()


def test_another_thread_times_out_and_learns_who_holds() -> None:
    errors: list[LockAcquireTimeout] = []

    def work() -> None:
        with pytest.raises(LockAcquireTimeout) as caught, lock("one", timeout=0.05):
            pytest.fail("two owners")
        errors.append(caught.value)

    with lock("one"):
        in_thread(work).join()

    assert "thread 'MainThread' of this process" in (errors[0].holder or "")


def test_the_same_thread_enters_again_and_the_last_exit_frees(rival: Rival) -> None:
    with lock("one"):
        with lock("one", timeout=0) as inner:
            assert current_lock() is inner
            assert not rival.try_hold("one")
        assert not rival.try_hold("one")

    assert rival.try_hold("one")


def test_the_outer_of_two_may_be_released_first(rival: Rival) -> None:
    outer = lock("one").acquire()
    inner = lock("one").acquire()

    outer.release()
    assert not rival.try_hold("one")
    inner.release()
    assert rival.try_hold("one")


def test_a_lock_is_entered_once() -> None:
    single = lock("one")
    with single, pytest.raises(LockReentrancyError, match="call lock"), single:
        pytest.fail("entered twice")
    with pytest.raises(LockReentrancyError), single:
        pytest.fail("entered again after its end")


def test_of_threads_that_enter_one_lock_at_once_one_does() -> None:
    together, entered, refused = threading.Barrier(4), [], []

    def enter(single: Lock) -> None:
        together.wait(LIMIT)
        try:
            entered.append(single.acquire())
        except LockReentrancyError:
            refused.append(single)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(200):
            single = lock(("one", number), shared=True, backend=MemoryBackend())
            for thread in [in_thread(partial(enter, single)) for _ in range(4)]:
                thread.join()
            entered.pop().release()
            assert (entered, len(refused)) == ([], 3)
            refused.clear()
    finally:
        sys.setswitchinterval(interval)


def test_a_nested_conflict_belongs_to_the_body(rival: Rival) -> None:
    rival.hold("inner")

    @concurrency_safe(key="outer", on_conflict="skip")
    def body() -> str:
        with lock("inner", timeout=0):
            return "never"

    with pytest.raises(LockAcquireTimeout, match="inner"):
        body()


def test_acquire_without_a_block_holds_until_release(rival: Rival) -> None:
    lock("kept").acquire()
    assert not rival.try_hold("kept")

    held = current_lock()
    assert held is not None
    held.release()
    assert rival.try_hold("kept")
    with pytest.raises(LockNotHeld, match="released already"):
        held.release()


def test_locks_that_others_release_leave_nothing_in_the_context_of_who_acquired() -> None:
    def depth() -> int:
        stack, found = locks._stack.get(), 0
        while stack is not None:
            stack, found = stack[1], found + 1
        return found

    before = depth()
    with lock("outer"):
        for _ in range(5):
            thread = in_thread(lock("handed over").acquire().release)
            thread.join()
            with lock("inner"):
                assert depth() <= before + 3
    assert depth() <= before + 1  # the last one


def test_a_release_inside_the_block_is_not_repeated(rival: Rival) -> None:
    with lock("one") as held:
        held.release()
        assert rival.try_hold("one")


def test_assert_locked_knows_what_is_held() -> None:
    with pytest.raises(LockNotHeld, match="no lock"):
        assert_locked()
    with lock("one"):
        assert_locked()
        assert_locked("one")
        with pytest.raises(LockNotHeld, match="'two' is not held here; held: 'one'"):
            assert_locked("one", "two")
    with pytest.raises(LockNotHeld, match="held: none"):
        assert_locked("one")


def test_a_cut_session_is_noticed_in_the_body_and_at_its_end(rival: Rival) -> None:
    noticed: list[HeldLock] = []

    def body(held: HeldLock) -> None:
        held.on_lost(noticed.append)
        cut_holders(rival)
        wait_for(lambda: held.is_lost)
        with pytest.raises(LockLost):
            held.check()
        with pytest.raises(LockLost):
            assert_locked("one")

    with pytest.raises(LockLost, match="'one'"), lock("one") as held:
        body(held)

    assert noticed == [held]


def test_who_asks_to_be_told_of_a_loss_that_was_noticed_is_told_at_once(rival: Rival) -> None:
    noticed: list[HeldLock] = []
    held = lock("stock:ABC").acquire()
    held.on_lost(noticed.append)
    cut_holders(rival)
    wait_for(lambda: held.is_lost)
    held.on_lost(noticed.append)
    assert noticed == [held, held]
    with pytest.raises(LockLost):
        held.release()


def test_a_loss_does_not_hide_the_body_error(rival: Rival) -> None:
    with pytest.raises(ZeroDivisionError), lock("one"):
        _ = 1 / cut_holders(rival)


def test_a_loss_is_only_logged_when_the_settings_say_so(rival: Rival, caplog: pytest.LogCaptureFixture) -> None:
    configure(on_lost="log")
    with lock("one"):
        cut_holders(rival)

    assert "'one' was lost" in caplog.text


def test_a_session_that_died_while_idle_is_replaced(store: LockStore, rival: Rival) -> None:
    with lock("one"):
        pass
    rival.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'cs:%' AND datname = current_database()"
    )
    wait_for(lambda: store.sessions() == 0)

    with lock("one"):
        assert store.rows() == 1


def test_each_session_is_opened_with_the_parameters_that_django_has_then(
    store: LockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database backend of one's own may have a new password for each connection."""
    with lock("one"):
        pass
    before = connection.get_connection_params()
    store.connection.execute("CREATE ROLE rotated SUPERUSER LOGIN")
    try:
        spaces.close_idle_sessions()
        with monkeypatch.context() as later:
            later.setattr(connection, "get_connection_params", lambda: {**before, "user": "rotated"})
            with lock("one"):
                assert store.connection.execute(
                    "SELECT usename FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
                ).fetchall() == [("rotated",)]
    finally:
        spaces.close_idle_sessions()
        wait_for(lambda: store.sessions() == 0)
        store.connection.execute("DROP ROLE rotated")


def test_a_store_that_is_away_fails_closed() -> None:
    configure(dsn="postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(LockUnavailable, match="Connection refused"), lock("one"):
        pytest.fail("the body ran unguarded")


def test_locks_can_be_switched_off(store: LockStore) -> None:
    configure(enabled=False)
    with lock("one"):
        assert store.rows() == 0


def test_what_can_not_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="slots=3 with 2 keys"):
        lock("one", "two", slots=3)
    with pytest.raises(ConfigurationError, match=r"is no lock store.*MemoryBackend"), lock("one", backend=object()):
        pytest.fail("the body ran unguarded")
    with pytest.raises(ConfigurationError, match="needs a key"):
        lock()
