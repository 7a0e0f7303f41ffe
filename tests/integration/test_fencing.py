"""Tokens that stop a holder who doesn't know that it is none any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from django.db import connection, models

from concurrency_safe import ConfigurationError, LockLost, configure, lock
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.fencing import fenced, fenced_update
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.sql import CREATE_FENCE
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore

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
