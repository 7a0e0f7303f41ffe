"""A network and servers that fail at the worst moment: nothing is left behind, and the error says what happened."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from concurrency_safe import LockAcquireTimeout, LockLost, LockUnavailable, configure, lock
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.core.steps import CallWait, SocketWait
from concurrency_safe.postgres import protocol
from concurrency_safe.postgres.backend import BUSY_KEYS, BUSY_TURNS, PostgresBackend
from concurrency_safe.postgres.session import cancel_steps, complete_conninfo, open_session
from concurrency_safe.postgres.waiting import drive
from tests.integration.conftest import LIMIT, LockStore, Rival, wait_for
from tests.servers.wire import Fault, Wire, cut, nonsense, replaced, silence


@pytest.fixture
def wire(dsn: str) -> Iterator[Wire]:
    """Let the library reach its store by a wire that can fail."""
    one = Wire(dsn)
    configure(dsn=one.dsn)
    yield one
    one.close()


class Interrupt(Exception):
    """What a signal handler raises."""


def later(fact: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    """Do `action` in another thread as soon as `fact()` is true."""

    def wait_and_act() -> None:
        wait_for(fact)
        action()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


# A new session.


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (cut, "refused a new session: .*closed the connection|refused a new session"),
        (nonsense, "refused a new session"),
        (replaced(b"tcp_keepalives_count", b"tcp_keepalives_coins"), "tcp_keepalives_coins"),
    ],
)
def test_a_session_that_can_not_be_set_up_is_unavailable(
    wire: Wire, store: LockStore, fault: Fault, message: str
) -> None:
    wire.fail(b"pg_is_in_recovery", fault)
    with pytest.raises(LockUnavailable, match=message), lock("one"):
        pytest.fail("the body ran unguarded")
    wait_for(lambda: store.sessions() == 0)


def test_a_server_that_can_not_watch_its_clients_serves_all_the_same(wire: Wire, rival: Rival) -> None:
    """The setting is refused where the platform can't do it: the value that this server refuses stands for that."""
    wire.fail(b"pg_is_in_recovery", replaced(b"'2000'", b"'20xy'"))
    with lock("one"):
        assert not rival.try_hold("one")
    assert rival.is_free("one")


def test_a_session_that_is_cut_in_its_first_statement_is_unavailable(wire: Wire, store: LockStore) -> None:
    """An old one would be replaced: this one shows that the server can't be had."""
    wire.fail(b"cs_try", cut)
    with pytest.raises(LockUnavailable), lock("one"):
        pytest.fail("the body ran unguarded")
    wait_for(lambda: store.sessions() == 0)


def test_a_session_that_is_cut_as_it_is_used_again_is_replaced(wire: Wire, rival: Rival) -> None:
    with lock("one"):
        pass
    opened = len(wire.links)
    wire.fail(b"cs_try", cut)
    with lock("one"):
        assert not rival.try_hold("one")
    assert rival.is_free("one")
    assert len(wire.links) == opened + 1


# A lock in use.


@pytest.mark.parametrize("fault", [cut, nonsense])
def test_a_cut_in_the_release_is_a_loss(wire: Wire, store: LockStore, rival: Rival, fault: Fault) -> None:
    wire.fail(b"cs_release", fault)
    with pytest.raises(LockLost), lock("one"):
        pass
    wait_for(lambda: rival.is_free("one"))
    wait_for(lambda: store.sessions() == 0)


def test_an_interrupt_leaves_a_release_that_hangs(wire: Wire, store: LockStore) -> None:
    wire.fail(b"cs_release", silence)

    def on_alarm(_number: int, _frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        single = lock("one")
        held = single.__enter__()
        interrupting = later(
            lambda: any(link.silent for link in wire.links),
            lambda: os.kill(os.getpid(), signal.SIGALRM),
        )
        with pytest.raises(Interrupt):
            held.release()
        interrupting.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    held._abandon()  # as its own finalizer may: twice is the same as once
    assert not held.is_active
    wire.close()
    wait_for(lambda: store.rows() == 0)


def tries_on(wire: Wire) -> list[bytes]:
    """Give the next try that goes through the wire, once it has."""
    seen: list[bytes] = []

    def note(_: object, data: bytes) -> bytes:
        seen.append(data)
        return data

    wire.fail(b"cs_try_one", note)
    return seen


def meet(rival: Rival) -> None:
    """Wait in vain for a key that is free then."""
    rival.hold("one")
    with pytest.raises(LockAcquireTimeout), lock("one", timeout=0.06):
        pytest.fail("two holders")
    rival.let_go()


def test_who_met_a_holder_lately_queues_without_a_try(wire: Wire, rival: Rival) -> None:
    meet(rival)
    tries = tries_on(wire)
    for _ in range(BUSY_TURNS):
        with lock("one"):
            assert not tries
    with lock("one"):
        assert tries


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": 1e-9}, {"shared": True}, {"max_waiters": 0}], ids=repr)
def test_a_try_is_made_where_a_wait_can_not_stand_for_it(options: dict[str, Any], wire: Wire, rival: Rival) -> None:
    meet(rival)
    tries = tries_on(wire)
    with lock("one", **options):
        assert tries


def test_so_many_busy_keys_are_remembered(dsn: str) -> None:
    backend = PostgresBackend(dsn, StoreOptions())
    for number in range(BUSY_KEYS + 1):
        backend._note_busy(number)
    assert list(backend._busy) == list(range(1, BUSY_KEYS + 1))


def test_holders_that_can_not_be_read_hide_no_conflict(wire: Wire, rival: Rival, store: LockStore) -> None:
    rival.hold("one")
    wire.fail(b"cs_holders", cut)
    with pytest.raises(LockAcquireTimeout) as caught, lock("one", timeout=0):
        pytest.fail("two holders")
    assert caught.value.holder is None
    rival.let_go()
    with lock("one", timeout=0):
        assert store.rows() == 1


def test_a_wait_that_an_operator_cancels_is_unavailable(store: LockStore, rival: Rival, dsn: str) -> None:
    configure(dsn=dsn)
    rival.hold("one")
    canceling = later(
        lambda: store.waiting() == 1,
        lambda: store.connection.execute("SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted"),
    )
    with pytest.raises(LockUnavailable, match="canceling statement due to user request"), lock("one", timeout=LIMIT):
        pytest.fail("two holders")
    canceling.join()
    assert store.waiting() == 0
    wait_for(lambda: store.sessions() == 0)


def test_nonsense_on_an_idle_session_is_a_loss(wire: Wire) -> None:
    def block() -> None:
        with lock("one") as held:
            assert not held.is_lost
            wire.links[-1].client.sendall(b"D\xff\xff\xff\xffnonsense")
            wait_for(lambda: held.is_lost)
            assert held.is_lost  # as often as one asks

    with pytest.raises(LockLost):
        block()


# The conversation.


def test_a_server_that_keeps_silent_is_given_up(wire: Wire) -> None:
    pgconn = drive(protocol.connect(wire.dsn.encode(), time.monotonic() + LIMIT))
    wire.fail(b"SELECT 1", silence)
    with pytest.raises(protocol.ServerGoneError, match="did not answer in time"):
        drive(protocol.query(pgconn, b"SELECT 1", time.monotonic() + 0.2))
    pgconn.finish()
    with pytest.raises(protocol.ServerGoneError):
        drive(protocol.query(pgconn, b"SELECT 1"))


def test_a_statement_larger_than_the_network_is_sent_in_pieces(wire: Wire) -> None:
    pgconn = drive(protocol.connect(wire.dsn.encode(), time.monotonic() + LIMIT))
    text = b"SELECT length('" + b"x" * 20_000_000 + b"')"
    result = drive(protocol.query(pgconn, text))
    assert result.get_value(0, 0) == b"20000000"

    wire.fail(b"SELECT", silence)
    with pytest.raises(protocol.ServerGoneError, match="did not read the statement in time"):
        drive(protocol.query(pgconn, text, time.monotonic() + 0.2))
    pgconn.finish()


def test_a_cancel_that_nobody_answers_is_given_up(dsn: str, store: LockStore) -> None:
    """As an interrupt does it: within its time, without an error, whatever the network does."""
    wire = Wire(dsn)
    pgconn = drive(protocol.connect(wire.dsn.encode(), time.monotonic() + LIMIT))
    try:
        pgconn.send_query(b"SELECT pg_sleep(60)")
        while pgconn.flush():
            pass
        wire.deaf = True
        with pytest.raises(protocol.ServerGoneError, match="did not answer the cancel request"):
            drive(protocol.cancel(pgconn, time.monotonic() + 0.1))
        drive(cancel_steps(pgconn))
        wire.hang_up()
        with pytest.raises(protocol.ServerGoneError):
            drive(protocol.cancel(pgconn, time.monotonic() + 5))
        drive(cancel_steps(pgconn))
    finally:
        store.connection.execute("SELECT pg_terminate_backend(%s, 15000)", [pgconn.backend_pid])
        pgconn.finish()
        with pytest.raises(protocol.ServerGoneError):
            drive(protocol.cancel(pgconn, time.monotonic() + 5))
        wire.close()


# Transactions.


@pytest.mark.parametrize("action", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_transaction_whose_wait_an_operator_ends_is_unavailable(action: str, store: LockStore, rival: Rival) -> None:
    rival.hold("one")
    ending = later(
        lambda: store.waiting() == 1,
        lambda: store.connection.execute(f"SELECT {action}(pid) FROM pg_locks WHERE NOT granted"),
    )

    def body() -> None:
        with lock("one", timeout=LIMIT):
            pytest.fail("two holders")

    with pytest.raises(LockUnavailable), transaction.atomic():
        body()
    ending.join()
    connection.close()
    assert store.waiting() == 0


# A forked child.


def test_a_connection_that_was_collected_is_nothing_to_a_child(dsn: str) -> None:
    pgconn = drive(protocol.connect(dsn.encode(), time.monotonic() + LIMIT))
    number = id(pgconn)
    pgconn.finish()
    del pgconn
    assert protocol._started[number]() is None
    child = os.fork()
    if not child:
        os._exit(0 if not protocol._started else 1)
    assert os.waitpid(child, 0)[1] == 0
    other = drive(protocol.connect(dsn.encode(), time.monotonic() + LIMIT))
    assert number not in protocol._started or protocol._started[number]() is other
    other.finish()


def test_a_connection_that_is_being_opened_is_closed_in_a_child(dsn: str) -> None:
    """Another thread's: it may hold a lock soon, and the child would keep it past its parent's death."""
    steps = open_session(complete_conninfo(dsn))
    start = next(steps)
    assert isinstance(start, CallWait)
    start.call()
    connecting = steps.send(True)  # noqa: FBT003 - it was called
    assert isinstance(connecting, SocketWait)
    child = os.fork()
    if not child:
        try:
            os.fstat(connecting.fd)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    steps.close()
