"""Tokens that stop a holder who doesn't know that it is none any more."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from itertools import permutations
from typing import ClassVar

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, models, transaction

from concurrency_safe import ConfigurationError, HeldLock, LockLost, LockUnavailable, configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.fencing import fenced, fenced_update
from concurrency_safe.memory import MemoryBackend
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres import pool as pools
from concurrency_safe.postgres import session as sessions
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.session import LockSession
from concurrency_safe.postgres.sql import CREATE_FENCE
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LIMIT, LockStore, wait_for
from tests.integration.test_shared_sessions import silent

pytestmark = pytest.mark.django_db(transaction=True)


class Account(models.Model):
    """Remembers the token of its last writer."""

    balance = models.IntegerField(default=0)
    fence = models.BigIntegerField(default=0)
    objects: ClassVar[models.Manager[Account]] = models.Manager()

    class Meta:
        app_label = "tests"

    def __str__(self) -> str:
        return f"{self.balance}"


@pytest.fixture
def account(store: LockStore) -> Iterator[Account]:
    configure(fencing=True)
    with connection.schema_editor() as editor:
        editor.create_model(Account)
    yield Account.objects.create()
    with connection.schema_editor() as editor:
        editor.delete_model(Account)


def test_the_migration_made_the_sequence(store: LockStore) -> None:
    assert store.connection.execute("SELECT count(*) FROM pg_sequences WHERE cache_size = 1").fetchone() != (0,)


def test_a_paused_holder_can_not_write(account: Account, store: LockStore) -> None:
    rows = Account.objects.filter(pk=account.pk)
    paused = lock("account").acquire()
    assert fenced_update(rows, paused, balance=models.F("balance") + 1) == 1
    assert fenced_update(rows, paused, balance=models.F("balance") + 1) == 1  # as often as it likes
    store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    with pytest.raises(LockLost):
        paused.release()

    with lock("account") as held:
        assert held.token is not None
        assert paused.token is not None
        assert held.token > paused.token
        assert fenced_update(rows, held, balance=models.F("balance") + 1) == 1
    assert not fenced(rows, paused).exists()
    with pytest.raises(LockLost, match="a later holder has written already"):
        fenced_update(rows, paused, balance=0)
    account.refresh_from_db()
    assert account.balance == 3


def test_all_rows_or_none(account: Account) -> None:
    Account.objects.create(fence=10**12)
    with lock("account") as held, pytest.raises(LockLost):
        fenced_update(Account.objects.all(), held, balance=7)
    assert not Account.objects.filter(balance=7).exists()


def test_a_lock_without_a_token_fences_nothing(account: Account) -> None:
    configure(fencing=False)
    with lock("account") as held, pytest.raises(ConfigurationError, match="FENCING"):
        fenced_update(Account.objects.all(), held, balance=7)


@pytest.mark.parametrize("scope", ["session", "transaction"])
def test_who_enters_a_key_again_has_its_newest_token(account: Account, scope: str) -> None:
    """The outer block may write after the inner one, and the token that was used for a key never goes back."""
    rows = Account.objects.filter(pk=account.pk)

    def write(*used: HeldLock) -> None:
        for held in used:
            assert fenced_update(rows, held, balance=models.F("balance") + 1) == 1

    with transaction.atomic() if scope == "transaction" else nullcontext():
        for keys in permutations(["x", "y", "z"]):
            x, y, z = keys
            with lock(x) as one, lock(y) as other:
                with lock(x, z) as two:
                    write(one, two, one)
                    with lock(z) as three, lock(x, z) as four:
                        write(two, three, four, one, two)
                write(one)
                with lock(x, y) as five:
                    write(other, five, one, five, other)
                    with lock(y) as six:
                        write(six, one)


def test_so_has_who_enters_it_again_inside_a_transaction(account: Account) -> None:
    rows = Account.objects.filter(pk=account.pk)
    with lock("x") as outside, transaction.atomic(), lock("x", "y") as both, lock("y") as inside:
        for held in (inside, both, outside, inside):
            assert fenced_update(rows, held, balance=models.F("balance") + 1) == 1


@pytest.mark.parametrize("around", [nullcontext, transaction.atomic])
def test_a_newer_token_is_given_to_nobody_who_may_have_lost_the_lock(
    account: Account, around: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a paused holder, who enters the lock again with one more key, could write after all."""
    monkeypatch.setattr(LockSession, "capacity", 1)
    monkeypatch.setattr(sessions, "HEARTBEAT_TIMEOUT", 0.1)
    one = lock("one").acquire()
    was = one.token
    with around():
        with lock("one", "other") as both:
            assert one.token == both.token
            assert both.token != was
        (session,) = {claim.session for claim in one._footing.claims}
        with silent(session), pytest.raises(LockLost, match="'one, other' was lost"), lock("one", "other"):
            pytest.fail("its session did not answer")
        assert one.token == both.token
        assert one.is_lost
        with pytest.raises(LockLost, match="'one' was lost"), lock("one"):
            pytest.fail("it is lost")
    with pytest.raises(LockLost):
        one.release()


def test_a_lock_that_was_lost_keeps_no_other_from_its_token(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockSession, "capacity", 1)
    monkeypatch.setattr(sessions, "HEARTBEAT_TIMEOUT", 0.1)
    lost = lock("x").acquire()
    around = lock("x", "y").acquire()
    was = around.token
    (session,) = {claim.session for claim in lost._footing.claims}
    with silent(session), lock("y", "z") as both:
        assert both.token != was == around.token
        assert not both.is_lost
    for held in (around, lost):
        with pytest.raises(LockLost):
            held.release()


def test_who_waits_for_a_lock_shares_no_token_yet(account: Account, store: LockStore) -> None:
    """A signal handler takes locks in the thread that waits."""
    seen: list[int] = []
    number, me = lock_key("y").number, threading.get_ident()

    def handle(*_: object) -> None:
        with lock("x", "z") as held:
            seen.append(held.token or 0)
        store.connection.execute("SELECT pg_advisory_unlock(%s)", [number])

    def interrupt(around: HeldLock) -> None:
        claims = around._footing.ownership
        assert claims is not None
        wait_for(lambda: any(not claim.held for claim in claims._held))
        signal.pthread_kill(me, signal.SIGUSR1)

    store.connection.execute("SELECT pg_advisory_lock(%s)", [number])
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with ThreadPoolExecutor() as crew, lock("x") as around:
            crew.submit(interrupt, around)
            with lock("x", "y", timeout=LIMIT) as both:
                assert around.token == both.token == seen[0] + 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_who_only_logs_a_loss_has_no_newer_token(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(on_lost="log")
    monkeypatch.setattr(LockSession, "capacity", 1)
    monkeypatch.setattr(sessions, "HEARTBEAT_TIMEOUT", 0.1)
    with lock("one") as one:
        was = one.token
        (session,) = {claim.session for claim in one._footing.claims}
        with silent(session), lock("one", "other") as both:
            assert both.token == one.token == was


def test_a_transaction_that_was_cut_has_no_newer_token(account: Account, store: LockStore) -> None:

    def body() -> None:
        with transaction.atomic(), lock("one") as one:
            was = one.token
            store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
            with lock("one", scope="detached", timeout=LIMIT) as later:
                assert later.token != one.token == was

    with pytest.raises(LockLost):
        body()
    connection.close()


def test_a_savepoint_that_was_rolled_back_has_no_newer_token(account: Account) -> None:
    def fail() -> None:
        with transaction.atomic():
            kept.append(lock("one").acquire())
            raise ZeroDivisionError

    kept: list[HeldLock] = []
    with transaction.atomic():
        with pytest.raises(ZeroDivisionError):
            fail()
        was = kept[0].token
        with lock("one") as one:
            assert one.token != kept[0].token == was


def test_others_who_know_of_a_lock_share_nothing_with_it(account: Account, store: LockStore) -> None:
    """A child thread has its parent's context, and is another owner."""

    def child() -> int | None:
        with lock("one", shared=True) as mine, lock("one", "other", shared=True) as both:
            assert mine.token == both.token
            return mine.token

    with ThreadPoolExecutor() as crew:
        parent = lock("one", shared=True).acquire()
        was = parent.token
        theirs = crew.submit(copy_context().run, child).result()
        assert parent.token == was != theirs
        store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        wait_for(lambda: parent.is_lost)
        assert crew.submit(copy_context().run, child).result() != theirs
        assert parent.token == was
    with pytest.raises(LockLost):
        parent.release()


def test_a_task_asks_nothing_on_the_connection_around_it(account: Account) -> None:
    async def detached() -> int | None:
        async with lock("other", scope="detached") as held:
            return held.token

    with transaction.atomic(), lock("one"):
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            raise ZeroDivisionError
        assert async_to_sync(detached)() is not None


def test_a_proof_does_not_wait_for_a_task_of_its_own_loop(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockSession, "capacity", 1)

    async def main() -> None:
        async with lock("one") as one:
            (session,) = {claim.session for claim in one._footing.claims}
            session.user = Footing(None)
            with pytest.raises(LockUnavailable, match="its session is in use"), lock("one", "other"):
                pytest.fail("nobody knows")
            session.user = None
            with lock("one", "other") as both:
                assert both.token == one.token

    asyncio.run(main())


def test_a_proof_waits_for_a_thread(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockSession, "capacity", 1)

    async def main() -> None:
        with lock("one") as one:
            pool = one._footing.backend.pool
            (session,) = {claim.session for claim in one._footing.claims}
            user = Footing(None)
            drive(pool.take(user, session))

            async def end_its_turn() -> None:
                await asyncio.to_thread(wait_for, lambda: pool._queue)
                drive(pool.free(user))

            ending = asyncio.create_task(end_its_turn())
            async with lock("one", "other") as both:
                assert both.token == one.token
            await ending

    asyncio.run(main())


def test_a_proof_needs_a_turn(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockSession, "capacity", 1)
    monkeypatch.setattr(pools, "STALL", 0.1)
    with lock("one") as one:
        (session,) = {claim.session for claim in one._footing.claims}
        session.user = Footing(None)
        with pytest.raises(LockUnavailable, match="'one' can't be proved to be held"), lock("one", "other"):
            pytest.fail("nobody knows")
        session.user = None
        with lock("one", "other"):
            pass


def test_who_only_logs_a_loss_enters_again(store: LockStore) -> None:
    configure(on_lost="log")
    with lock("one") as one:
        store.connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        wait_for(lambda: one.is_lost)
        with lock("one") as again:
            assert again.is_lost


def test_tokens_of_other_stores_are_none_of_ours(account: Account) -> None:
    with lock("one") as one:
        was = one.token
        with lock("one", backend=MemoryBackend()) as other:
            assert other.token == 1
            assert one.token == was
    store = MemoryBackend()
    with lock("x", backend=store) as x, lock("y", backend=store) as y, lock("x", "y", backend=store) as both:
        assert x.token == y.token == both.token == 2


def test_a_token_stays_as_it_is_while_other_keys_are_taken(account: Account) -> None:
    with lock("one") as one:
        was = one.token
        with lock("other") as other:
            assert one.token == was
            assert was is not None
            assert other.token is not None
            assert was < other.token


def test_tokens_rise_across_a_promotion() -> None:
    with PostgresServer() as primary:
        backend = PostgresBackend(primary.dsn, StoreOptions(fencing=True))
        store = LockStore(primary.dsn)
        store.connection.execute(CREATE_FENCE)
        with primary.standby() as standby:
            tokens = []
            for _ in range(50):
                with lock("one", backend=backend) as held:
                    tokens.append(held.token or 0)
            store.connection.execute("SELECT pg_switch_wal()")
            backend.close()
            store.connection.close()
            primary.kill()
            standby.promote()
            backend = PostgresBackend(standby.dsn, StoreOptions(fencing=True))
            for _ in range(50):
                with lock("one", backend=backend) as held:
                    tokens.append(held.token or 0)
            backend.close()
    assert tokens == sorted(set(tokens))
