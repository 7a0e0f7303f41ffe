"""Locks and Django's transactions: no lost update, and a transaction that stays as it was."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from django.db import DatabaseError, connection, connections, transaction
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from concurrency_safe import (
    ConfigurationError,
    LockAcquireTimeout,
    LockDeadlock,
    LockInTransaction,
    LockLost,
    LockNotHeld,
    LockUnavailable,
    assert_locked,
    concurrency_safe,
    lock,
    locks,
)
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

PROCESSES = 8
INCREMENTS = 25

#: How each process guards its read-modify-write; `step` reads and writes with a pause between, in the server.
GUARDS = {
    "outside": "with lock('counter', timeout=60), transaction.atomic(): step()",
    "inside": "with transaction.atomic(), lock('counter', timeout=60): step()",
    "ATOMIC_REQUESTS": "assert client.get('/step/').status_code == 200",
    "none": "with transaction.atomic(): step()",
}

COUNTER = """
import sys
import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

from tests.settings import DATABASES
DATABASES["default"]["ATOMIC_REQUESTS"] = "ATOMIC_REQUESTS" in sys.argv
settings.configure(DATABASES=DATABASES, ROOT_URLCONF=__name__, ALLOWED_HOSTS=["testserver"], SECRET_KEY="x")
django.setup()

from django.db import connection, transaction
from django.test import Client
from concurrency_safe import concurrency_safe, lock

client = Client()

def step():
    with connection.cursor() as cursor:
        cursor.execute("SELECT value FROM counter")
        (value,) = cursor.fetchone()
        cursor.execute("SELECT pg_sleep(0.001)")
        cursor.execute("UPDATE counter SET value = %s", [value + 1])

@concurrency_safe(key="counter", timeout=60)
def view(request):
    step()
    return HttpResponse()

urlpatterns = [path("step/", view)]
for _ in range(25):
    GUARD
"""


@pytest.fixture
def counter(store: LockStore) -> Iterator[LockStore]:
    store.connection.execute("CREATE TABLE counter (value int)")
    store.connection.execute("INSERT INTO counter VALUES (0)")
    yield store
    store.connection.execute("DROP TABLE counter")


@pytest.mark.parametrize("guard", GUARDS)
def test_read_modify_write_by_many_processes(guard: str, counter: LockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", counter.url)
    program = COUNTER.replace("GUARD", GUARDS[guard])
    command = [sys.executable, "-c", program, guard]
    processes = [subprocess.Popen(command) for _ in range(PROCESSES)]

    assert [process.wait() for process in processes] == [0] * PROCESSES

    row = counter.connection.execute("SELECT value FROM counter").fetchone()
    assert row
    if guard == "none":
        assert row[0] < PROCESSES * INCREMENTS  # the test can fail
    else:
        assert row[0] == PROCESSES * INCREMENTS
    assert counter.rows() == 0


def test_inside_atomic_the_lock_lasts_until_the_commit(rival: Rival) -> None:
    with transaction.atomic():
        with lock("one") as held:
            assert held.waited >= 0
        assert not rival.try_hold("one")

    assert rival.is_free("one")


def test_a_lock_ends_with_its_transaction(rival: Rival) -> None:
    """Acquired without a block, it is not held any more after the commit, whatever transaction comes next."""
    with transaction.atomic():
        held = lock("one").acquire()
        with transaction.atomic():
            held.check()
        assert_locked("one")
    assert rival.is_free("one")
    with transaction.atomic():
        assert not held.is_active
        with pytest.raises(LockNotHeld):
            held.check()
        with pytest.raises(LockNotHeld):
            assert_locked("one")
    held.release()
    with pytest.raises(LockNotHeld):
        held.release()


def test_a_connection_that_the_body_closes_is_a_loss() -> None:
    """Its transaction is gone, and its lock with it; Django itself would say nothing."""

    def body() -> None:
        with lock("one") as held:
            assert not held.is_lost
            connection.close()
            assert held.is_lost

    with pytest.raises(LockLost), transaction.atomic():
        body()


def test_a_rollback_frees_it(rival: Rival) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic(), lock("one"):
        _ = 1 / 0

    assert rival.is_free("one")


def test_session_scope_is_refused_inside_atomic_with_the_remedy() -> None:
    with (
        transaction.atomic(),
        pytest.raises(LockInTransaction, match="detached"),
        lock("one", scope="session"),
    ):
        pytest.fail("it would be released before the commit")


def test_transaction_scope_is_refused_outside_atomic() -> None:
    with pytest.raises(LockInTransaction, match="inside atomic"), lock("one", scope="transaction"):
        pytest.fail("there is nothing to hold it until")


def test_transaction_scope_is_refused_without_django(store: LockStore) -> None:
    script = "from concurrency_safe import lock\nwith lock('one', scope='transaction'): pass"
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": store.url}
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment)
    assert ran.returncode == 1
    assert "ConfigurationError: lock 'one': scope='transaction' needs a Django connection" in ran.stderr


def test_a_transaction_on_another_alias_is_refused() -> None:
    with (
        transaction.atomic(using="other"),
        pytest.raises(LockInTransaction, match="'other'"),
        lock("one"),
    ):
        pytest.fail("it would be released before the other's commit")
    with transaction.atomic(using="other"), lock("one", using="other"):
        pass


def test_detached_scope_ends_with_its_block_inside_atomic(rival: Rival) -> None:
    with transaction.atomic():
        with lock("one", scope="detached"):
            assert not rival.try_hold("one")
        assert rival.is_free("one")


def test_a_manual_transaction_counts_as_one(rival: Rival) -> None:
    transaction.set_autocommit(False)
    try:
        with lock("one"):
            pass
        assert not rival.try_hold("one")
        transaction.commit()
        assert rival.is_free("one")
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


def test_an_alias_without_autocommit_is_in_a_transaction_before_it_is_connected(rival: Rival) -> None:
    connection.close()
    connection.settings_dict["AUTOCOMMIT"] = False
    try:
        with lock("one"):
            pass
        assert not rival.try_hold("one")
        with pytest.raises(LockInTransaction, match="'default'"), lock("two", using="other"):
            pytest.fail("it would be released before the other's commit")
        connection.rollback()
        connection.close()
        with lock("two", using="other"):  # what was never connected has written nothing
            pass
    finally:
        connection.settings_dict["AUTOCOMMIT"] = True
        connection.close()


def test_a_commit_by_hand_ends_a_lock(rival: Rival) -> None:
    transaction.set_autocommit(False)
    try:
        with lock("one") as held:
            held.check()
            transaction.commit()
            assert not held.is_active
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")  # the next transaction
            with pytest.raises(LockNotHeld):
                assert_locked("one")
            assert rival.is_free("one")
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


def test_a_rollback_to_a_savepoint_ends_the_locks_that_came_later(rival: Rival) -> None:
    with transaction.atomic():
        with lock("kept"):
            before = transaction.savepoint()
            with lock("one") as held:
                held.check()
                transaction.savepoint_rollback(before)
                assert not held.is_active
                assert rival.is_free("one")
                with pytest.raises(LockNotHeld):
                    assert_locked("one")
                for _ in range(2):
                    assert_locked("kept")
        assert not rival.try_hold("kept")


def test_in_a_broken_transaction_a_lock_counts_as_held() -> None:
    """Until its rollback, which is all that can be done there."""
    with transaction.atomic():
        held = lock("one").acquire()
        transaction.savepoint_rollback(transaction.savepoint())  # so that the server has to be asked
        with pytest.raises(DatabaseError), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
        assert held.is_active
        transaction.set_rollback(True)
    assert not held.is_active


@pytest.mark.parametrize("timeout", [0, 1, None])
def test_a_transaction_that_failed_before_is_refused(timeout: float | None, rival: Rival) -> None:
    with transaction.atomic():
        with pytest.raises(DatabaseError):
            connection.cursor().execute("SELECT 1/0")
        with pytest.raises(LockUnavailable, match=r"'one' was not acquired: current transaction is aborted"):
            lock("one", timeout=timeout).acquire()
        transaction.set_rollback(True)
    assert rival.is_free("one")


def backend_pid() -> int:
    """Give the server process of Django's connection, which has a transaction then."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        pid: int = cursor.fetchone()[0]
    return pid


def try_in_transaction(pid: int) -> None:
    with lock("one", timeout=0):
        pytest.fail(f"the body ran, beside {pid}")


def test_a_connection_that_dies_inside_its_transaction_is_unavailable(store: LockStore) -> None:
    @transaction.atomic
    def die() -> None:
        pid = backend_pid()
        store.connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        try:
            try_in_transaction(pid)
        finally:
            assert connection.errors_occurred  # so Django looks after the connection at the end of the request

    with pytest.raises(LockUnavailable):
        die()
    with lock("one", timeout=0):
        pass


@pytest.mark.parametrize("wakes", [True, False])
def test_an_interrupt_ends_a_try_inside_a_transaction(*, wakes: bool, rival: Rival) -> None:
    class Interrupt(BaseException):
        pass

    pid = 0

    def on_alarm(_number: int, _frame: object) -> None:
        if wakes:
            os.kill(pid, signal.SIGCONT)
        raise Interrupt

    @transaction.atomic
    def be_interrupted() -> None:
        nonlocal pid
        pid = backend_pid()
        os.kill(pid, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            try_in_transaction(pid)
        finally:
            # One statement ends with its cancellation; a server that keeps silent costs the connection.
            assert connection.connection.closed is not wakes

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with pytest.raises(Interrupt):
            be_interrupted()
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: rival.is_free("one"))
    with transaction.atomic(), lock("one", timeout=0):
        pass


def test_who_listens_to_statements_sees_the_locks(rival: Rival) -> None:
    with transaction.atomic(), CaptureQueriesContext(connection) as seen:
        backend_pid()
        with lock("one", timeout=0):
            assert not rival.is_free("one")
    assert any("pg_try_advisory_xact_lock" in each["sql"] for each in seen.captured_queries)


def test_calls_of_an_atomic_function_are_different_transactions() -> None:
    """Django enters one and the same block each time."""

    @transaction.atomic
    def call(number: int) -> None:
        if number == 0:
            lock("one").acquire()
            assert_locked("one")
        else:
            with pytest.raises(LockNotHeld):
                assert_locked("one")
            lock("another").acquire()

    before = len(locks._kept)
    for number in range(4):
        call(number)
    assert len(locks._kept) <= before + 1


def test_a_lock_that_ends_before_the_commit_does_not_serve_as_the_transactions() -> None:
    with transaction.atomic(), lock("one", scope="detached") as held:
        with pytest.raises(LockInTransaction, match="would be released before its commit"), lock("one"):
            pytest.fail("its updates could be lost")
        held.check()


def test_what_a_transaction_has_entered_again_is_not_released_before_the_commit(rival: Rival) -> None:
    outer, second = lock("one").acquire(), lock("one").acquire()
    with transaction.atomic():
        with lock("one"):
            second.release()  # the outer one keeps it
        with pytest.raises(LockInTransaction, match="release it after the commit"):
            outer.release()
        assert not rival.try_hold("one")
    outer.release()
    assert rival.is_free("one")


def test_an_exit_before_the_commit_keeps_what_the_transaction_has_entered_again(rival: Rival) -> None:
    around = ExitStack()
    around.enter_context(lock("one"))
    with transaction.atomic():
        with lock("one"):
            pass
        with pytest.raises(LockInTransaction, match="release it after the commit"):
            around.close()
        assert not rival.try_hold("one")
    wait_for(lambda: gc.collect() and rival.is_free("one"))  # nobody has it any more


def test_an_exit_before_the_commit_does_not_hide_the_bodys_error(rival: Rival) -> None:
    around = ExitStack()
    around.enter_context(lock("one"))

    @transaction.atomic
    def body() -> None:
        with lock("one"):
            pass
        with around:
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        body()
    assert rival.is_free("one")


@pytest.mark.parametrize("inside", [True, False])
def test_slots_of_this_process_and_a_transaction_do_not_mix(*, inside: bool) -> None:
    with ExitStack() as outer:
        outer.enter_context(lock("gpu of this test", slots=2))
        if not inside:
            outer.close()
        with (
            transaction.atomic(),
            pytest.raises(ConfigurationError, match=r"slots=1, but this process uses it with slots=2"),
            lock("gpu of this test"),
        ):
            pytest.fail("beside the holder of a slot")


def test_an_outer_session_lock_is_entered_again_inside_atomic(rival: Rival) -> None:
    with lock("one"):
        with transaction.atomic(), lock("one", timeout=0):
            pass
        assert not rival.try_hold("one")

    assert rival.is_free("one")


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_a_conflict_leaves_the_transaction_as_it_was(timeout: float, counter: LockStore, rival: Rival) -> None:
    rival.hold("one")
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '7s'")
        cursor.execute("SET LOCAL statement_timeout = '9s'")
        cursor.execute("UPDATE counter SET value = 42")
        with pytest.raises(LockAcquireTimeout) as caught, lock("one", timeout=timeout):
            pytest.fail("two holders")
        cursor.execute(
            "SELECT value, current_setting('lock_timeout'), current_setting('statement_timeout') FROM counter"
        )
        assert cursor.fetchone() == (42, "7s", "9s")

    assert str(rival.pid) in (caught.value.holder or "")
    assert counter.connection.execute("SELECT value FROM counter").fetchone() == (42,)


def wait_inside_atomic(rival: Rival, store: LockStore, timeout: float | None) -> list[object]:
    """Wait for a taken key inside a transaction of another thread; the rival lets go once it waits."""
    seen: list[object] = []

    def work() -> None:
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SET LOCAL lock_timeout = '7s'")
                with lock("one", timeout=timeout):
                    cursor.execute("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
                    seen.append(cursor.fetchone())
                    seen.append(rival.try_hold("one"))
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: store.waiting() == 1)
    rival.let_go()
    thread.join()
    return seen


@pytest.mark.parametrize("timeout", [10.0, None])
def test_a_wait_inside_atomic_ends_with_the_lock_and_the_old_settings(
    timeout: float | None, store: LockStore, rival: Rival
) -> None:
    rival.hold("one")

    assert wait_inside_atomic(rival, store, timeout) == [("7s", "0"), False]
    assert rival.is_free("one")


def test_a_statement_timeout_of_the_user_does_not_cut_the_wait(store: LockStore, rival: Rival) -> None:
    rival.hold("one")
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL statement_timeout = '50ms'")
        with pytest.raises(LockAcquireTimeout), lock("one", timeout=0.3):
            pytest.fail("two holders")


def test_a_deadlock_names_its_victim_and_leaves_the_transaction_usable(rival: Rival) -> None:
    rival.hold("second")
    rival.connection.execute("SET deadlock_timeout = '1h'")  # so that the rival is not the one who finds it

    with transaction.atomic(), lock("first"):
        crossing = threading.Thread(target=rival.hold, args=["first"])
        crossing.start()
        with pytest.raises(LockDeadlock, match=r"'second'.*one order"), lock("second", timeout=10):
            pytest.fail("two holders")
        with connection.cursor() as cursor:
            cursor.execute("SELECT 'still usable'")
    crossing.join()


def test_a_deadlock_across_two_sessions_ends_by_the_timeout(rival: Rival, store: LockStore) -> None:
    rival.hold("second")
    rival.connection.execute("SET deadlock_timeout = '1h'")
    held = lock("first").acquire()
    crossing = threading.Thread(target=rival.hold, args=["first"])
    crossing.start()

    # Two sessions of ours take part, so the server sees no cycle: only the timeout ends it.
    with pytest.raises(LockAcquireTimeout), lock("second", timeout=0.3):
        pytest.fail("two holders")

    held.release()
    crossing.join()
    rival.let_go()
    assert store.rows() == 0


def test_the_body_error_surfaces_when_the_transaction_is_broken(store: LockStore) -> None:
    for guarded in (lock("one"), lock("one", scope="detached")):
        with pytest.raises(DatabaseError, match="no_such_table"), transaction.atomic(), guarded:
            connection.cursor().execute("SELECT * FROM no_such_table")
        assert store.rows() == 0


def test_a_broken_transaction_inside_the_lock_surfaces_its_own_error(store: LockStore, rival: Rival) -> None:
    with pytest.raises(DatabaseError, match="no_such_table"), lock("one"), transaction.atomic():
        connection.cursor().execute("SELECT * FROM no_such_table")

    assert store.rows() == 0
    assert rival.is_free("one")


def test_closing_djangos_connection_does_not_lose_the_lock(rival: Rival) -> None:
    from django.core.signals import request_finished
    from django.db import close_old_connections

    with lock("one"):
        connection.cursor().execute("SELECT 1")
        connection.close()
        close_old_connections()
        request_finished.send(sender=None)
        connections.close_all()
        assert not rival.try_hold("one")

    assert rival.is_free("one")


class InsideTestCase(TestCase):
    """Django's own blocks around a test are not the code's."""

    def test_outside_atomic_it_is_a_session_lock(self) -> None:
        with lock("one", scope="session") as held:
            assert held._footing.claims

    def test_inside_atomic_it_is_the_transactions(self) -> None:
        with transaction.atomic(), lock("one") as held:
            assert not held._footing.claims

    def test_the_decorator_works(self) -> None:
        @concurrency_safe(key="one")
        def body() -> str:
            return "ran"

        assert body() == "ran"


def test_an_unknown_alias_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(ConfigurationError, match=r"'nowhere'.*'default'"),
        lock("one", using="nowhere"),
    ):
        pytest.fail("the body ran unguarded")


#: Django takes psycopg 2 only where it can't import psycopg 3.
ON_PSYCOPG2 = """
import sys
sys.modules["psycopg"] = None
import django.db.backends.postgresql.base
del sys.modules["psycopg"]
"""

ON_A_POOL = """
from tests.settings import DATABASES
DATABASES["default"]["CONN_MAX_AGE"] = 0
DATABASES["default"]["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 2}}
"""

ON_ANY_DRIVER = """
import os, signal, sys, threading, time
import django
from django.conf import settings
from tests.settings import DATABASES
settings.configure(DATABASES=DATABASES)
django.setup()
from django.db import connection, transaction
from concurrency_safe import LockAcquireTimeout, LockUnavailable, lock
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for

store, rival = LockStore(sys.argv[1]), Rival(sys.argv[1])

with transaction.atomic():
    print(type(connection.connection).__module__, connection.settings_dict["OPTIONS"])
    with lock("one"):
        pass
    assert not rival.try_hold("one")
assert rival.is_free("one")

rival.hold("one")
with transaction.atomic(), connection.cursor() as cursor:
    cursor.execute("SET LOCAL lock_timeout = '7s'")
    for timeout in (0, 0.5):
        try:
            with lock("one", timeout=timeout):
                raise AssertionError("two holders")
        except LockAcquireTimeout as conflict:
            assert str(rival.pid) in conflict.holder, conflict
    cursor.execute("SELECT current_setting('lock_timeout')")
    assert cursor.fetchone() == ("7s",)

class Interrupt(Exception):
    pass

def on_alarm(*_):
    raise Interrupt(time.monotonic())

signal.signal(signal.SIGALRM, on_alarm)
with transaction.atomic(), connection.cursor() as cursor:
    def alarm():
        wait_for(lambda: store.waiting() == 1)
        os.kill(os.getpid(), signal.SIGALRM)
    thread = threading.Thread(target=alarm)
    thread.start()
    try:
        with lock("one", timeout=None):
            raise AssertionError("two holders")
    except Interrupt as interrupt:
        late = time.monotonic() - interrupt.args[0]
        assert late < 0.25, late
    thread.join()

with transaction.atomic(), connection.cursor() as cursor:
    def cancel():
        wait_for(lambda: store.waiting() == 1)
        store.connection.execute("SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted")
    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        with lock("one", timeout=None):
            raise AssertionError("two holders")
    except LockUnavailable as error:
        assert "canceling statement" in str(error), error
    thread.join()
    cursor.execute("SELECT 1")
    cursor.execute("SELECT 'still usable'")
    wait_for(lambda: store.waiting() == 0, 1.0)

threading.Thread(target=lambda: (wait_for(lambda: store.waiting() == 1), rival.let_go())).start()
with transaction.atomic(), lock("one", timeout=10):
    pass
assert rival.is_free("one")
with lock("one"):
    connection.cursor().execute("SELECT 1")
    connection.close()
    assert not rival.try_hold("one")
assert rival.is_free("one")
"""


@pytest.mark.parametrize(
    ("prologue", "driver"),
    [("", "psycopg"), (ON_PSYCOPG2, "psycopg2"), (ON_A_POOL, "psycopg_pool")],
)
def test_transaction_scope_on_every_driver(
    prologue: str, driver: str, store: LockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", store.url)
    command = [sys.executable, "-c", prologue + ON_ANY_DRIVER, store.url]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split(".")[0].split()[0] == driver.replace("_pool", "")
    assert ("pool" in ran.stdout) == (driver == "psycopg_pool")
    assert store.rows() == 0
