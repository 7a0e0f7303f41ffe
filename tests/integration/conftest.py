"""What the tests on real servers share: the lock store, a view into it, rivals, and waiting for facts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from concurrency_safe import conf, spaces
from concurrency_safe.core.keys import lock_key

#: Seconds that a test waits for a fact at most. Not a pause: it ends when the fact is there.
LIMIT = 15.0

_between_looks = threading.Event()  # never set


def wait_for(fact: Callable[[], object], limit: float = LIMIT) -> None:
    """Look until `fact()` is true; fail the test after `limit` seconds."""
    until = time.monotonic() + limit
    while not fact():
        assert time.monotonic() < until, f"not seen within {limit} s: {fact}"
        _between_looks.wait(0.002)  # leave the processor to those who are waited for


def bare_environment() -> dict[str, str]:
    """Give our environment less what names a database: for a process that gets a DSN of its own."""
    return {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "DJANGO_SETTINGS_MODULE")}


class LockStore:
    """The database that holds the locks, seen by a session of its own."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True)

    @property
    def url(self) -> str:
        """The DSN as a URL, as DATABASE_URL takes it."""
        info = self.connection.info
        return f"postgresql://{info.user}:{info.password}@{info.host}:{info.port}/{info.dbname}"

    def count(self, condition: str = "true") -> int:
        """Count the advisory locks in this database, held or awaited, for which `condition` holds."""
        row = self.connection.execute(
            "SELECT count(*) FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory'"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            f" AND l.pid <> pg_backend_pid() AND ({condition})"
        ).fetchone()
        assert row
        return int(row[0])

    def waiting(self) -> int:
        return self.count("NOT l.granted")

    def rows(self) -> int:
        return self.count()

    def sessions(self) -> int:
        """Count the library's sessions in this database."""
        row = self.connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'cs:%'"
        ).fetchone()
        assert row
        return int(row[0])


class Rival:
    """Another session, which holds keys as another host would."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.pid = self.connection.info.backend_pid

    def hold(self, key: str | tuple[object, ...]) -> None:
        self.connection.execute("SELECT pg_advisory_lock(%s)", [lock_key(key).number])

    def try_hold(self, key: str) -> bool:
        row = self.connection.execute("SELECT pg_try_advisory_lock(%s)", [lock_key(key).number]).fetchone()
        assert row
        return bool(row[0])

    def is_free(self, key: str) -> bool:
        """Say whether `key` can be had right now; take nothing."""
        if self.try_hold(key):
            self.let_go()
            return True
        return False

    def let_go(self) -> None:
        self.connection.execute("SELECT pg_advisory_unlock_all()")


@pytest.fixture(autouse=True)
def fresh_library() -> Iterator[None]:
    """Leave no session and no setting of one test to the next."""
    yield
    spaces.close_idle_sessions()
    conf.reset()


@pytest.fixture
def dsn(db_name: str) -> str:
    """Give the DSN of the lock store, for code that has no Django."""
    return db_name


@pytest.fixture
def db_name(transactional_db: None) -> str:
    """Give the DSN of Django's test database."""
    from django.db import connection

    from concurrency_safe.postgres.alias import dsn_of

    return dsn_of(connection)


@pytest.fixture
def store(dsn: str) -> Iterator[LockStore]:
    seen = LockStore(dsn)
    yield seen
    seen.connection.close()


@pytest.fixture
def rival(dsn: str) -> Iterator[Rival]:
    other = Rival(dsn)
    yield other
    other.connection.close()
