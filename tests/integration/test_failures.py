"""Limits, and servers that fail: an error that says which, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import psycopg
import pytest
from django.db import connection, transaction
from psycopg import conninfo

from concurrency_safe import (
    ConfigurationError,
    LockAcquireTimeout,
    LockCapacityError,
    LockNotHeld,
    LockUnavailable,
    configure,
    lock,
)
from concurrency_safe.core.keys import LockKey
from concurrency_safe.core.sessions import Request, StoreOptions
from concurrency_safe.core.steps import Steps
from concurrency_safe.gates import LoopGate, ThreadGate
from concurrency_safe.ownership import Claim, Footing, Owner, Ownership, running
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.inspect import session_name, short
from concurrency_safe.postgres.session import complete_conninfo, open_session
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LIMIT, LockStore, Rival, wait_for

HOLDER = (
    "SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def enter(claims: Ownership, footing: Footing, key: LockKey, owner: Owner) -> Steps[Claim | None]:
    """Queue for `key` as a lock does."""
    return claims.enter(footing, Request((key,)), owner)


# In this process.


def test_more_locks_than_max_held_are_refused(store: LockStore) -> None:
    configure(max_held=2)
    with lock("one"), lock("two"):
        with pytest.raises(LockCapacityError, match=r"holds 2 locks.*MAX_HELD=2"), lock("three"):
            pytest.fail("one more than the cap")
        with lock("two"):
            assert store.rows() == 2

    with lock("three"):
        assert store.rows() == 1


@pytest.mark.parametrize("owner", ["the same", "another"])
def test_two_keys_of_one_number_are_refused(owner: str) -> None:
    claims = Ownership(10)
    me = Owner(threading.current_thread(), None)
    held = Footing(None)
    assert drive(enter(claims, held, LockKey("one", 7), me)) is None
    claims.confirm(held)

    with pytest.raises(ConfigurationError, match="'one' and 'two' have the same number 7"):
        drive(enter(claims, Footing(None), LockKey("two", 7), me if owner == "the same" else Owner(me._who(), None)))
    claims.leave(held.claims[0])
    assert claims.find(LockKey("one", 7), me) is None


def test_a_callback_of_the_loop_is_no_task() -> None:
    async def who() -> tuple[object, object]:
        answer: asyncio.Future[tuple[object, object]] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: answer.set_result(running()))
        return await answer

    assert asyncio.run(who()) == (threading.current_thread(), None)


def test_an_interrupt_as_a_lock_leaves_its_key_leaves_nothing() -> None:
    """Whatever was done before it is done once more."""

    class Interrupt(BaseException):
        pass

    class Interrupted(set[Claim]):
        """Is interrupted as the first claim leaves it."""

        hits = 0

        def discard(self, claim: object) -> None:
            self.hits += 1
            if self.hits == 1:
                raise Interrupt
            super().discard(claim)

    held = lock("one").acquire()
    owner = held._footing.owner
    claims = held._footing.ownership
    assert claims is not None
    assert owner is not None
    claims._held = Interrupted(claims._held)
    with pytest.raises(Interrupt):
        held.release()
    assert claims.find(held._keys[0], owner) is None


def test_a_gate_may_be_opened_twice() -> None:
    gate = ThreadGate()
    gate.open()
    gate.open()
    assert gate.wait(0)


def test_a_gate_of_a_loop_may_be_opened_before_anybody_stands_at_it() -> None:
    async def main() -> bool:
        gate = LoopGate(asyncio.get_running_loop())
        gate.open()
        await asyncio.sleep(0)
        return await gate.wait(0) and not await gate.wait(0)

    assert asyncio.run(main())


def test_a_released_lock_says_so() -> None:
    with lock("one") as held:
        assert repr(held) == "<HeldLock 'one' held>"
    assert repr(held) == "<HeldLock 'one' not held>"
    with pytest.raises(LockNotHeld, match="not held any more"):
        held.check()
    assert repr(lock("one")) == "<Lock 'one'>"


def test_a_forgotten_lock_ends_its_session(store: LockStore) -> None:
    """As when an exception hits `__exit__` before its first line."""
    single = lock("one")
    single.__enter__()
    assert store.rows() == 1
    del single
    wait_for(lambda: store.rows() == 0)


def test_a_works_name_fits_into_the_sessions() -> None:
    assert session_name("0b9a3c1e").endswith(":0b9a3c1e")
    assert len(session_name("x" * 200)) <= 63
    assert short("x" * 200) != short("x" * 201)
    assert short("ä").isascii()


# The pool.


def test_the_pool_keeps_pool_size_sessions(store: LockStore, rival: Rival) -> None:
    """Those who wait have more, for as long as they wait and hold."""
    configure(pool_size=2)
    keys = [f"key {number}" for number in range(4)]
    for key in keys:
        rival.hold(key)
    done = threading.Event()

    def work(key: str) -> None:
        with lock(key, timeout=None):
            done.wait(LIMIT)

    threads = [threading.Thread(target=work, args=[key]) for key in keys]
    for thread in threads:
        thread.start()
    wait_for(lambda: store.waiting() == len(keys))
    rival.let_go()
    wait_for(lambda: store.sessions() == len(keys) and store.waiting() == 0)
    done.set()
    for thread in threads:
        thread.join()

    wait_for(lambda: store.sessions() == 2)


def test_an_idle_session_ends_after_pool_idle(store: LockStore) -> None:
    configure(pool_idle=0.0)
    with lock("one"):
        first = store.connection.execute(HOLDER).fetchone()
    with lock("one"):
        second = store.connection.execute(HOLDER).fetchone()

    assert first != second
    wait_for(lambda: store.sessions() <= 1)


# The server.


def test_a_full_lock_table_is_a_capacity_error() -> None:
    settings = {"max_locks_per_transaction": "10", "max_connections": "10", "max_wal_senders": "0"}
    with PostgresServer(settings) as server, psycopg.connect(server.dsn, autocommit=True) as greedy:
        backend = PostgresBackend(server.dsn, StoreOptions())
        with lock("one", backend=backend):
            pass
        with pytest.raises(psycopg.errors.OutOfMemory):
            greedy.execute("SELECT count(pg_advisory_lock(n)) FROM generate_series(1, 1000000) n")
        with pytest.raises(LockCapacityError, match="max_locks_per_transaction"), lock("two", backend=backend):
            pytest.fail("the body ran unguarded")
        backend.close()


def test_a_server_that_dies_under_a_waiter_is_unavailable() -> None:
    with PostgresServer() as server:
        rival, store = Rival(server.dsn), LockStore(server.dsn)
        rival.hold("one")
        errors: list[BaseException] = []

        def wait() -> None:
            backend = PostgresBackend(server.dsn, StoreOptions())
            with (
                pytest.raises(LockUnavailable, match="'one' was not acquired") as caught,
                lock("one", timeout=None, backend=backend),
            ):
                pytest.fail("two holders")
            errors.append(caught.value)

        waiter = threading.Thread(target=wait)
        waiter.start()
        wait_for(lambda: store.waiting() == 1)
        server.stop()
        waiter.join()
        assert errors
        rival.connection.close()
        store.connection.close()


def test_a_waiter_whose_session_is_cut_is_unavailable(store: LockStore, rival: Rival) -> None:
    rival.hold("one")
    errors: list[LockUnavailable] = []

    def wait() -> None:
        with pytest.raises(LockUnavailable, match="'one'") as caught, lock("one", timeout=None):
            pytest.fail("two holders")
        errors.append(caught.value)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_for(lambda: store.waiting() == 1)
    store.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks"
        " WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    waiter.join()

    assert errors
    assert store.rows() == 1  # the rival's


def test_a_silent_server_is_given_up_at_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dsn = f"postgresql://nobody@127.0.0.1:{listener.getsockname()[1]}/none?connect_timeout=1"
        started = time.monotonic()
        with pytest.raises(LockUnavailable, match="in time"):
            drive(open_session(complete_conninfo(dsn)))

    assert 1 <= time.monotonic() - started < 5


def test_a_stopped_holder_of_the_session_does_not_block_discard(dsn: str) -> None:
    """The cancel request has a limit of its own, also where the server process does not react."""
    session = drive(open_session(complete_conninfo(dsn)))
    session.pgconn.send_query(b"SELECT pg_sleep(60)")
    os.kill(session.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        drive(session.end())
        assert time.monotonic() - started < 1
    finally:
        os.kill(session.pid, signal.SIGCONT)


# DSN and alias.


@pytest.mark.parametrize("choice", ["disable", "random"])
def test_a_host_that_is_silent_is_left_for_the_next(dsn: str, choice: str) -> None:
    port = conninfo.conninfo_to_dict(dsn)["port"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"{silent.getsockname()[1]},{port}"}
        info = complete_conninfo(conninfo.make_conninfo(dsn, **hosts, connect_timeout=1, load_balance_hosts=choice))
        assert drive(open_session(info)).pid


def test_a_connect_timeout_that_is_no_number_is_refused_by_name(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="connect_timeout='soon' of the lock store's DSN is no number"):
        drive(open_session(conninfo.make_conninfo(dsn, connect_timeout="soon")))


def test_hosts_and_ports_that_do_not_fit_are_refused_by_name(dsn: str) -> None:
    info = complete_conninfo(conninfo.make_conninfo(dsn, host="127.0.0.1,127.0.0.1,127.0.0.1", port="1,2"))
    with pytest.raises(LockUnavailable, match="2 port numbers to 3 hosts"):
        drive(open_session(info))


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:secret@host:port:5432/%zz",
        "postgis://me:secret@host/x",
        "postgresql+psycopg://me:secret@host/x",
        "postgresql://me:secret/@host/x",
        "postgresql://me:hidden@secret@host/x",
        "host=h password='secret",
        "host=h password=secret secret",
    ],
)
def test_a_dsn_that_cannot_be_read_is_refused_without_its_password(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="can't be read") as caught:
        complete_conninfo(dsn)
    assert "secret" not in str(caught.value)
    assert ("is none of ours" in str(caught.value)) == dsn.startswith(("postgis", "postgresql+"))


def test_a_dsn_to_another_database_is_refused(dsn: str) -> None:
    configure(dsn=conninfo.make_conninfo(dsn, dbname="template1"))
    with pytest.raises(ConfigurationError, match="different databases"), lock("one"):
        pytest.fail("the body ran on a lock that does not exclude")
    with (
        transaction.atomic(),
        pytest.raises(ConfigurationError, match="different databases"),
        lock("one"),
    ):
        pytest.fail("the body ran on a lock that does not exclude")


def test_a_dsn_to_the_same_database_by_another_name_is_fine(dsn: str, rival: Rival) -> None:
    host = conninfo.conninfo_to_dict(dsn)["host"]
    other = "localhost" if host == "127.0.0.1" else "127.0.0.1"
    configure(dsn=conninfo.make_conninfo(dsn, host=other))
    with lock("one"):
        assert not rival.try_hold("one")
    with transaction.atomic(), lock("two"):
        assert not rival.try_hold("two")


def test_a_silent_host_does_not_stop_the_comparison(dsn: str) -> None:
    port = conninfo.conninfo_to_dict(dsn)["port"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"{silent.getsockname()[1]},{port}"}
        configure(dsn=conninfo.make_conninfo(dsn, **hosts, connect_timeout=1))
        with lock("one") as held:
            assert not held.is_lost


def test_a_dsn_that_cannot_be_read_is_not_repeated_where_it_is_compared() -> None:
    configure(dsn="postgis://me:secret@host/x")
    with pytest.raises(ConfigurationError, match="can't be read") as caught, lock("one"):
        pytest.fail("the body ran unguarded")
    assert "secret" not in str(caught.value)


def test_a_dsn_that_is_away_can_not_be_compared(dsn: str) -> None:
    configure(dsn=conninfo.make_conninfo(dsn, port="1"))
    with pytest.raises(LockUnavailable, match="could not be checked"), lock("one"):
        pytest.fail("the body ran unguarded")


# Transactions.


@pytest.mark.parametrize("timeout", [0, 5])
def test_a_transaction_whose_session_is_cut_is_unavailable(timeout: float, store: LockStore, rival: Rival) -> None:
    rival.hold("one")

    def body() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            (pid,) = cursor.fetchone()
        store.connection.execute("SELECT pg_terminate_backend(%s, 15000)", [pid])
        with lock("one", timeout=timeout):
            pytest.fail("two holders")

    with pytest.raises(LockUnavailable), transaction.atomic():
        body()
    connection.close()


def test_a_conflict_in_a_process_that_holds_nothing_else_frees_its_session(store: LockStore, rival: Rival) -> None:
    rival.hold("one")
    with pytest.raises(LockAcquireTimeout), lock("one", timeout=0):
        pytest.fail("two holders")
    assert store.rows() == 1
    assert store.sessions() == 1
