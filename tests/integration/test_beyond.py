"""What no peer has, under load: many keys, slots, one connection for many locks, tokens, poolers, losses."""

from __future__ import annotations

import _thread
import ast
import itertools
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeAlias

import psycopg
import pytest

from concurrency_safe import (
    ConfigurationError,
    HeldLock,
    LockAcquireTimeout,
    LockCapacityError,
    LockLost,
    configure,
    instrumentation,
    lock,
    ownership,
    threads,
)
from concurrency_safe.core.events import LockEvent
from concurrency_safe.core.keys import lock_key, slot_numbers
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.memory import MemoryBackend
from concurrency_safe.postgres import backend
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.session import LockSession
from concurrency_safe.postgres.sql import CREATE_FENCE
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for
from tests.servers.pgbouncer import PgBouncer
from tests.servers.wire import Wire

PREFACE = """
import sys, random, threading, time
import psycopg
from concurrency_safe import configure, lock
dsn, number = sys.argv[1], int(sys.argv[2])
log = psycopg.connect(dsn, autocommit=True)
"""


def run(program: str, dsn: str, processes: int) -> list[str]:
    """Run `program` in so many processes at once; each gets the DSN and its number. Return what they print."""
    command = [sys.executable, "-c", PREFACE + program, dsn]
    running = [
        subprocess.Popen(
            [*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=bare_environment()
        )
        for number in range(processes)
    ]
    said = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(out)
    return said


# Several keys.


@pytest.mark.timeout(150)
def test_several_keys_in_any_order_never_deadlock(store: LockStore) -> None:
    """8 processes, 250 rounds each, of three keys out of six, in orders of chance."""
    said = run(
        """
configure(dsn=dsn)
chance = random.Random(number)
for _ in range(250):
    with lock(*chance.sample("abcdef", 3), timeout=60):
        pass
print("done")
""",
        store.url,
        8,
    )
    assert said == ["done\n"] * 8
    assert store.rows() == 0


def test_a_part_of_the_keys_is_nothing(store: LockStore, rival: Rival) -> None:
    rival.hold("b")
    for timeout in (0, 0.05):
        with pytest.raises(LockAcquireTimeout) as caught, lock("a", "b", "c", timeout=timeout):
            pytest.fail("two holders")
        assert str(rival.pid) in (caught.value.holder or "")
    assert store.rows() == 1


def test_several_keys_are_one_statement_when_they_are_free() -> None:
    program = """
configure(dsn=dsn)
with lock("a", "b", "c"): pass
with lock("a", "b", "c"): pass
"""
    with PostgresServer(settings={"log_statement": "all"}) as server:
        run(program, server.dsn, 1)
        ours = [line for line in server.log.read_text().splitlines() if "execute cs_" in line]
    assert ["cs_try_all" in line for line in ours] == [True, False, True, False]
    assert ["cs_release_many" in line for line in ours] == [False, True, False, True]


# Slots.


@pytest.mark.timeout(120)
def test_slots_are_first_come_first_served_and_ask_rarely() -> None:
    """15 clients, 3 slots: never more than three inside, all three used, nobody overtakes."""
    program = """
configure(dsn=dsn, timeout=60, max_block=60)
log.execute("SELECT pg_advisory_lock_shared(1)")  # all start together
with lock("gpu", slots=3):
    log.execute("INSERT INTO inside (who, asked) VALUES (%s, false)", [number])
    log.execute("SELECT pg_sleep(0.03)")
    log.execute("INSERT INTO inside (who, asked) VALUES (%s, true)", [number])
"""
    with PostgresServer(settings={"log_statement": "all"}) as server:
        gate = psycopg.connect(server.dsn, autocommit=True)
        gate.execute("CREATE TABLE inside (place serial, who int, asked bool)")
        gate.execute("SELECT pg_advisory_lock(1)")
        starting = threading.Thread(target=run, args=[program, server.dsn, 15])
        starting.start()
        count = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_for(lambda: gate.execute(count).fetchone() == (15,), 60)
        gate.execute("SELECT pg_advisory_unlock(1)")
        starting.join()
        rows = gate.execute("SELECT who, asked FROM inside ORDER BY place").fetchall()
        left = gate.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()")
        assert left.fetchone() == (0,)
        gate.close()
        log = server.log.read_text()

    inside, most = 0, 0
    for _, leaves in rows:
        inside += -1 if leaves else 1
        most = max(most, inside)
    assert most == 3
    executed = [line for line in log.splitlines() if "execute cs_" in line]
    assert len(executed) <= 5 * 15


def test_slots_wait_in_order(store: LockStore) -> None:
    """The queue of a key with slots is the server's, too."""
    store.connection.execute(CREATE_FENCE)
    held = [HeldSlot("line") for _ in range(2)]
    program = """
configure(dsn=dsn, max_block=60, fencing=True)
with lock("line", slots=2, timeout=None) as held:
    print(held.token)  # drawn in the statement of the grant
"""
    said: dict[int, str] = {}
    threads = []
    for number in range(5):
        thread = threading.Thread(target=lambda number=number: said.update({number: run(program, store.url, 1)[0]}))
        thread.start()
        threads.append(thread)
        wait_for(lambda: store.waiting() + gates(store) == len(threads), 30)
    for one in held:
        one.let_go()
    for thread in threads:
        thread.join()
    tokens = [int(said[number]) for number in range(5)]
    assert tokens == sorted(tokens)


def test_one_try_for_a_slot_waits_out_who_tries_just_then(store: LockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = slot_numbers(lock_key("line"), 2)[0]
    store.connection.execute("SELECT pg_advisory_lock(%s)", [gate])
    with pytest.raises(LockAcquireTimeout):
        lock("line", slots=2, timeout=0).acquire()

    monkeypatch.setattr(backend, "TRIES", 10_000)

    def leave_when_asked() -> None:
        asks = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cs:%%' AND query LIKE %s"
        wait_for(lambda: store.connection.execute(asks, ["%pg_locks%"]).fetchone() == (1,))
        store.connection.execute("SELECT pg_advisory_unlock(%s)", [gate])

    thread = threading.Thread(target=leave_when_asked)
    thread.start()
    with lock("line", slots=2, timeout=0):
        thread.join()


def test_the_slots_of_many_keys_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SLOTS_KNOWN", 2)
    backend = MemoryBackend()
    for number in range(5):
        with lock(f"key {number}", slots=2, backend=backend):
            pass
    with lock("key 0", slots=3, backend=backend):
        pass
    with pytest.raises(ConfigurationError, match="uses it with slots=2"):
        lock("key 4", slots=3, backend=backend).acquire()


def gates(store: LockStore) -> int:
    """Count the one who holds the gate of "line", at the head of the queue."""
    gate = slot_numbers(lock_key("line"), 2)[0] & 0xFFFFFFFF
    return store.count(f"l.granted AND l.objid = {gate}")


class HeldSlot:
    """A slot held by a thread of its own, until it is let go."""

    def __init__(self, key: str) -> None:
        self.ready, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.work, args=[key])
        self.thread.start()
        assert self.ready.wait(15)

    def work(self, key: str) -> None:
        with lock(key, slots=2):
            self.ready.set()
            self.done.wait(60)

    def let_go(self) -> None:
        self.done.set()
        self.thread.join()


def test_the_numbers_of_slots_are_frozen() -> None:
    """Hosts on different releases must count the same slots."""
    assert slot_numbers(lock_key("gpu"), 2) == (4518582159180942275, -3998939082509831219, 2536311186823923299)


# One connection for many locks.


def test_threads_that_hold_many_keys_share_the_sessions(store: LockStore) -> None:
    configure(pool_size=4)
    ready, done = threading.Barrier(17), threading.Event()

    def work(number: int) -> None:
        held = [lock(f"key {number} {each}").acquire() for each in range(200 // 16 + 1)]
        ready.wait(30)
        done.wait(30)
        for one in held:
            one.release()

    threads = [threading.Thread(target=work, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    ready.wait(30)
    rows, sessions = store.rows(), store.sessions()
    done.set()
    for thread in threads:
        thread.join()
    assert rows == 16 * 13
    assert sessions <= 5
    assert store.rows() == 0


def test_one_thread_needs_one_session(store: LockStore) -> None:
    with lock("one"), lock("two"), lock("three"):
        assert store.rows() == 3
        wait_for(lambda: store.sessions() == 1)  # those of the test before are gone


def test_a_thousand_locks(store: LockStore) -> None:
    held = [lock(f"key {number}").acquire() for number in range(1000)]
    try:
        assert store.rows() == 1000
        assert store.sessions() <= 5
        with pytest.raises(LockCapacityError, match="MAX_HELD=1000"), lock("one more"):
            pytest.fail("beyond the cap")
    finally:
        for one in held:
            one.release()
    assert store.rows() == 0


def test_where_all_sessions_are_full_one_more_is_kept(store: LockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each further lock would open and end a session."""
    monkeypatch.setattr(LockSession, "capacity", 2)
    configure(pool_size=2)
    held = [lock(f"key {number}").acquire() for number in range(4)]
    number = lock_key("one more").number
    holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid::int8 = %s"
    pids = set()
    for _ in range(3):
        with lock("one more"):
            row = store.connection.execute(holder, [number & 0xFFFFFFFF]).fetchone()
            assert row
            pids.add(row[0])
    assert len(pids) == 1
    assert store.sessions() == 3

    held[0].release()
    with lock("one more"):  # there is room beside another
        pass
    wait_for(lambda: store.sessions() == 2)
    for one in held[1:]:
        one.release()


def test_a_waiter_gets_a_session_of_its_own(store: LockStore, rival: Rival) -> None:
    """Else the locks that share its session could not be released while it waits."""
    rival.hold("two")
    with ThreadPoolExecutor(1) as pool:
        with lock("one"):
            waiting = pool.submit(lambda: lock("two", timeout=None).acquire())
            wait_for(lambda: store.waiting() == 1 and store.sessions() == 2)
        assert rival.is_free("one")  # and lets go of "two"
        pool.submit(waiting.result().release).result()
    assert store.rows() == 0


def test_a_shared_session_that_is_cut_loses_all_its_locks(store: LockStore) -> None:
    held = [lock(f"key {number}").acquire() for number in range(3)]
    told: list[HeldLock] = []
    for one in held:
        one.on_lost(told.append)
    store.connection.execute("SELECT DISTINCT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    wait_for(lambda: len(told) == 3)
    for one in held:
        with pytest.raises(LockLost):
            one.release()


def test_a_forgotten_lock_on_a_shared_session_is_freed_alone(store: LockStore, rival: Rival) -> None:
    kept = lock("kept").acquire()
    forgotten = lock("forgotten")
    forgotten.__enter__()
    wait_for(lambda: store.sessions() == 1)
    del forgotten
    wait_for(lambda: rival.is_free("forgotten"))
    assert not rival.try_hold("kept")
    assert not kept.is_lost
    kept.release()
    assert store.rows() == 0


# Loss.


def cut(store: LockStore) -> None:
    store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")


def test_a_loss_is_seen_while_the_body_runs(store: LockStore) -> None:
    seen: list[float] = []

    def body() -> None:
        with lock("one") as held:
            held.on_lost(lambda _: seen.append(time.monotonic()))
            seen.append(time.monotonic())
            cut(store)
            wait_for(lambda: len(seen) == 2)

    with pytest.raises(LockLost):
        body()
    assert seen[1] - seen[0] < 0.1


def test_the_body_error_is_not_hidden_by_a_loss(store: LockStore) -> None:
    def body() -> None:
        with lock("one") as held:
            cut(store)
            wait_for(lambda: held.is_lost)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        body()
    assert "was lost" in getattr(caught.value, "__notes__", ["was lost"])[0]


def test_a_callback_that_fails_keeps_nobody_from_hearing(store: LockStore, caplog: pytest.LogCaptureFixture) -> None:
    told: list[HeldLock] = []

    def fail(_: HeldLock) -> None:
        raise ZeroDivisionError

    def body() -> None:
        with lock("one") as held:
            held.on_lost(fail)
            held.on_lost(told.append)
            cut(store)
            wait_for(lambda: told)

    with pytest.raises(LockLost):
        body()
    assert "a callback on the loss of lock 'one' failed" in caplog.text


AddHandler: TypeAlias = Callable[[Callable[[logging.LogRecord], object]], None]


@pytest.fixture
def handlers() -> Iterator[AddHandler]:
    """Let functions hear what the library logs, in errors."""
    logger, added = logging.getLogger("concurrency_safe"), list[logging.Handler]()

    def add(hear: Callable[[logging.LogRecord], object]) -> None:
        handler = logging.Handler(logging.ERROR)
        handler.emit = hear  # type: ignore[assignment,method-assign]
        logger.addHandler(handler)
        added.append(handler)

    yield add
    for handler in added:
        logger.removeHandler(handler)


def test_a_log_that_hangs_keeps_nobody_from_hearing(store: LockStore, handlers: AddHandler) -> None:
    """A worker's log may be a pipe that nobody reads any more."""
    told: list[HeldLock] = []
    logged: list[str] = []
    goes_on = threading.Event()

    def hang(record: logging.LogRecord) -> None:
        goes_on.wait(30)
        logged.append(record.getMessage())

    handlers(hang)
    for key in ("one", "two", "three"):
        held = lock(key).acquire()
        held.on_lost(told.append)
        cut(store)
        wait_for(lambda held=held: held in told)  # type: ignore[misc]
    assert not logged

    goes_on.set()
    wait_for(lambda: len(logged) == 3)
    assert logged == [f"lock {key!r} was lost while it was held" for key in ("one", "two", "three")]
    for held in told:
        with pytest.raises(LockLost):
            held.release()


def test_a_log_that_hangs_keeps_nobody_from_hearing_of_a_release_that_fails(
    store: LockStore, handlers: AddHandler
) -> None:
    """The thread that releases may be the first to notice, and others' locks may have been on the same session."""
    told: list[HeldLock] = []
    goes_on, both = threading.Event(), threading.Barrier(2)
    handlers(lambda _: goes_on.wait(30))
    held = lock("one").acquire()

    def other() -> None:
        with lock("two") as mine:
            mine.on_lost(told.append)
            both.wait(30)
            goes_on.wait(30)

    with ThreadPoolExecutor() as crew:
        others = crew.submit(other)
        held.on_lost(told.append)
        both.wait(30)
        pool = held._footing.backend.pool
        (session,) = pool.sessions
        with pool.mutex:  # keeps the watcher waiting
            cut(store)
            wait_for(session.is_dead)
            began = time.monotonic()
            with pytest.raises(LockLost):
                held.release()
            assert time.monotonic() - began < 10
        assert [one.keys for one in told] == [("two",), ("one",)]
        goes_on.set()
        with pytest.raises(LockLost):
            others.result()


class Interrupt(Exception):
    """Stands for a time limit."""


def test_an_interrupt_while_a_loss_is_told_keeps_nobody_from_hearing(store: LockStore, handlers: AddHandler) -> None:
    told: list[HeldLock] = []
    goes_on = threading.Event()
    me = threading.get_ident()

    def interrupt(*_: object) -> None:
        raise Interrupt

    def hang(record: logging.LogRecord) -> None:
        if "'one'" in record.getMessage():
            signal.pthread_kill(me, signal.SIGUSR1)
        goes_on.wait(30)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        handlers(hang)
        both = [lock(key).acquire() for key in ("one", "two")]
        for held in both:
            held.on_lost(told.append)
        pool = both[0]._footing.backend.pool
        (session,) = pool.sessions
        with pool.mutex:  # keeps the watcher waiting
            cut(store)
            wait_for(session.is_dead)
            with pytest.raises(Interrupt):
                _ = both[0].is_lost
        wait_for(lambda: len(told) == 2)
    finally:
        goes_on.set()
        signal.signal(signal.SIGUSR1, before)
    for held in both:
        with pytest.raises(LockLost):
            held.release()


def test_a_callback_that_ends_its_thread_keeps_no_other_owner_from_hearing(store: LockStore) -> None:
    told: list[HeldLock] = []

    def end(held: HeldLock) -> None:
        told.append(held)
        raise SystemExit

    both = [lock(key).acquire() for key in ("one", "two", "one")]
    for held in both:
        held.on_lost(end)
    cut(store)
    wait_for(lambda: len(told) == 3)
    for held in both:
        with pytest.raises(LockLost):
            held.release()


@pytest.mark.parametrize("failure", [None, RuntimeError("can't start new thread")])
def test_a_loss_is_logged_also_without_a_thread_for_that(
    failure: RuntimeError | None,
    store: LockStore,
    handlers: AddHandler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There may be no room for one, and one may die at birth (see `concurrency_safe.threads`)."""
    start = _thread.start_new_thread
    born: list[int] = []
    logged: list[str] = []

    def fail_once(run: Callable[[], None], args: tuple[()]) -> int:
        born.append(1)
        if len(born) > 1:
            return start(run, args)
        if failure is not None:
            raise failure
        return start(int, ())

    handlers(lambda record: logged.append(record.getMessage()))
    with lock("none"):
        pass  # the watcher is there now
    monkeypatch.setattr(_thread, "start_new_thread", fail_once)
    monkeypatch.setattr(threads, "START_LIMIT", 0.2)
    monkeypatch.setattr(instrumentation, "_teller", None)
    for key in ("one", "two"):
        held = lock(key).acquire()
        held.on_lost(lambda held: logged.append(f"{held.keys[0]} is told"))
        cut(store)
        wait_for(lambda key=key: f"{key} is told" in logged)  # type: ignore[misc]
        with pytest.raises(LockLost):
            held.release()
    assert len(born) == 2
    assert logged == [
        "lock 'one' was lost while it was held",
        "one is told",
        "lock 'two' was lost while it was held",
        "two is told",
    ]


def test_a_callback_that_fails_while_the_log_hangs_keeps_nobody_from_hearing(
    store: LockStore, handlers: AddHandler
) -> None:
    told: list[HeldLock] = []
    logged: list[str] = []
    goes_on = threading.Event()

    def hang(record: logging.LogRecord) -> None:
        goes_on.wait(30)
        logged.append(record.getMessage() + str(record.exc_info and record.exc_info[0]))

    def fail(_: HeldLock) -> None:
        raise ZeroDivisionError

    handlers(hang)
    held = lock("one").acquire()
    held.on_lost(fail)
    held.on_lost(told.append)
    cut(store)
    wait_for(lambda: told)
    with pytest.raises(LockLost):
        held.release()
    goes_on.set()
    wait_for(lambda: len(logged) == 2)
    assert logged == [
        "lock 'one' was lost while it was heldNone",
        "a callback on the loss of lock 'one' failed<class 'ZeroDivisionError'>",
    ]


def test_who_hears_of_a_loss_at_the_release_is_in_the_context_of_the_release(store: LockStore) -> None:
    """As who writes the id of a request beside each line."""
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    def hook(_: LockEvent) -> None:
        seen.append(request.get())

    held = lock("one").acquire()
    pool = held._footing.backend.pool
    (session,) = pool.sessions
    instrumentation.add_hook(hook)
    request.set("mine")
    try:
        with pool.mutex:  # keeps the watcher waiting
            cut(store)
            wait_for(session.is_dead)
            with pytest.raises(LockLost):
                held.release()
    finally:
        instrumentation.remove_hook(hook)
    assert seen == ["mine", "mine"]  # released, lost


def test_the_log_hears_of_a_loss_first(store: LockStore, handlers: AddHandler) -> None:
    """A callback may end the process."""
    logged: list[logging.LogRecord] = []
    handlers(logged.append)
    for times in (1, 2):
        seen: list[int] = []
        held = lock("one").acquire()
        held.on_lost(lambda _, seen=seen: seen.append(len(logged)))  # type: ignore[misc]
        cut(store)
        wait_for(lambda seen=seen: seen)  # type: ignore[misc]
        assert seen == [times]
        with pytest.raises(LockLost):
            held.release()


@pytest.mark.parametrize("failure", [ZeroDivisionError, SystemExit])
def test_a_log_that_fails_keeps_nobody_from_hearing(
    failure: type[BaseException], store: LockStore, handlers: AddHandler, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[HeldLock] = []

    def fail(_: logging.LogRecord) -> None:
        raise failure

    handlers(fail)
    for times in (1, 2):
        held = lock("one").acquire()
        held.on_lost(told.append)
        cut(store)
        wait_for(lambda times=times: len(told) == times)  # type: ignore[misc]
        with pytest.raises(LockLost):
            held.release()
    assert len(re.findall(f"^{failure.__name__}$", capfd.readouterr().err, re.MULTILINE)) == 2


@pytest.mark.timeout(90)
def test_a_network_that_falls_silent_is_noticed(dsn: str) -> None:
    """Neither end of a black hole says anything: the watcher asks for a sign of life."""
    wire = Wire(dsn)
    backend = PostgresBackend(wire.dsn, StoreOptions())
    held = lock("one", backend=backend).acquire()
    for link in wire.links:
        link.silence()
    silent = time.monotonic()
    wait_for(lambda: held.is_lost, 30)
    assert time.monotonic() - silent < 30
    with pytest.raises(LockLost):
        held.release()
    wire.close()


# Tokens.


@pytest.mark.timeout(150)
def test_tokens_rise_strictly(store: LockStore) -> None:
    store.connection.execute(CREATE_FENCE)
    said = run(
        """
configure(dsn=dsn, fencing=True, timeout=60)
tokens = []
for _ in range(1250):
    with lock("one") as held:
        tokens.append((time.monotonic_ns(), held.token))
print(tokens)
""",
        store.url,
        8,
    )
    drawn = sorted(pair for text in said for pair in ast.literal_eval(text))
    tokens = [token for _, token in drawn]
    assert len(tokens) == 10_000
    assert all(earlier < later for earlier, later in itertools.pairwise(tokens))


def test_without_the_sequence_it_says_what_to_do() -> None:
    with PostgresServer() as server:
        backend = PostgresBackend(server.dsn, StoreOptions(fencing=True))
        with pytest.raises(ConfigurationError, match=r"migrate concurrency_safe"), lock("one", backend=backend):
            pytest.fail("the body ran without a token")
        backend.close()


# A pooler.


@pytest.mark.timeout(120)
def test_behind_a_pooler_in_transaction_mode() -> None:
    with PostgresServer() as server, PgBouncer(server, {"default_pool_size": "12"}) as pooler:
        admin = psycopg.connect(server.dsn, autocommit=True)
        admin.execute("CREATE TABLE inside (place serial, who int, leaves bool)")
        admin.execute("CREATE TABLE rows AS SELECT generate_series(1, 20000) n")
        run(
            """
configure(dsn=dsn, pooler="transaction", timeout=60)
for _ in range(30):
    with lock("one"):
        log.execute("INSERT INTO inside (who, leaves) VALUES (%s, false)", [number], prepare=False)
        log.execute("INSERT INTO inside (who, leaves) VALUES (%s, true)", [number], prepare=False)
""",
            pooler.dsn,
            6,
        )
        rows = admin.execute("SELECT who, leaves FROM inside ORDER BY place").fetchall()
        assert len(rows) == 6 * 30 * 2
        assert all(one == (who, False) and two == (who, True) for one, two, who in _pairs(rows))

        backend = PostgresBackend(pooler.dsn, StoreOptions(pooled=True))
        with lock("one", backend=backend):
            holder = admin.execute(
                "SELECT backend_xid, backend_xmin, application_name FROM pg_stat_activity JOIN pg_locks USING (pid)"
                " WHERE locktype = 'advisory'"
            ).fetchone()
            assert holder is not None
            assert holder[:2] == (None, None)
            assert holder[2].startswith("cs:")
            admin.execute("DELETE FROM rows")
            admin.execute("VACUUM rows")
            assert admin.execute("SELECT pg_relation_size('rows')").fetchone() == (0,)
        backend.close()
        wait_for(lambda: admin.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,))
        admin.close()


def _pairs(rows: list[tuple[int, bool]]) -> list[tuple[tuple[int, bool], tuple[int, bool], int]]:
    return [(rows[at], rows[at + 1], rows[at][0]) for at in range(0, len(rows), 2)]


def test_a_killed_holder_frees_its_lock_at_once(store: LockStore, rival: Rival) -> None:
    program = "configure(dsn=dsn)\nlock('one').acquire()\nprint('held', flush=True)\nthreading.Event().wait()"
    command = [sys.executable, "-c", PREFACE + program, store.url, "0"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=bare_environment())
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert not rival.try_hold("one")
    holder.kill()
    killed = time.monotonic()
    wait_for(lambda: rival.is_free("one"))
    assert time.monotonic() - killed < 1
    holder.wait()
    holder.stdout.close()
