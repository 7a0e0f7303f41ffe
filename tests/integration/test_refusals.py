"""Stores on which a lock would not exclude are refused, with the remedy: the body never runs."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg
import pytest

from concurrency_safe import ConfigurationError
from concurrency_safe.postgres.session import complete_conninfo, open_session, refuse_impostor
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import bare_environment
from tests.servers.pgbouncer import PgBouncer

#: A script that turns out to be Django's after its first lock.
LATE_DJANGO = """
import os, sys
from concurrency_safe import ConfigurationError, lock
with lock("first"):
    pass
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
os.environ["DATABASE_URL"] = sys.argv[1]
try:
    with lock("second"):
        sys.exit("the lock of another database was taken")
except ConfigurationError as error:
    print(error)
"""

TAKE = """
import sys
from concurrency_safe import ConcurrencySafeError, configure, lock
configure(dsn=sys.argv[1])
for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
    try:
        with lock("one"):
            print("the body ran")
    except ConcurrencySafeError as error:
        print(type(error).__name__, error)
"""

TAKE_ON_ALIAS = """
import sys
import django
import pymysql
pymysql.install_as_MySQLdb()
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends." + sys.argv[1], "NAME": ":memory:"}}, **eval(sys.argv[2])
)
django.setup()
from concurrency_safe import ConcurrencySafeError, lock
try:
    with lock("one"):
        print("the body ran")
except ConcurrencySafeError as error:
    print(type(error).__name__, error)
"""


def take(*arguments: str, program: str = TAKE) -> str:
    """Run `program` in a process without our environment's DSN; return what it printed."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=bare_environment()).stdout


def test_a_standby_is_refused() -> None:
    with PostgresServer() as primary, primary.standby() as standby:
        assert take(primary.dsn).strip() == "the body ran"

        said = take(standby.dsn)
        assert said.startswith("LockUnavailable")
        assert "standby" in said
        assert "target_session_attrs=read-write" in said

        standby.promote()
        assert take(standby.dsn).strip() == "the body ran"


@pytest.mark.parametrize("engine", ["mysql", "sqlite3"])
def test_another_engine_is_refused(engine: str) -> None:
    said = take(engine, "{}", program=TAKE_ON_ALIAS)

    assert said.startswith("ConfigurationError")
    assert engine.rstrip("3") in said
    assert "DSN" in said


@pytest.mark.parametrize("engine", ["mysql", "sqlite3"])
def test_another_engine_with_a_lock_store_of_its_own_is_fine(engine: str) -> None:
    with PostgresServer() as server:
        settings = repr({"CONCURRENCY_SAFE": {"DSN": server.dsn}})

        assert take(engine, settings, program=TAKE_ON_ALIAS).strip() == "the body ran"


def test_no_store_at_all_is_an_error_that_says_how_to_name_one() -> None:
    program = "from concurrency_safe import lock\nwith lock('one'): print('the body ran')"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env=bare_environment(),
    )

    assert "the body ran" not in ran.stdout
    assert "ConfigurationError" in ran.stderr
    assert "CONCURRENCY_SAFE_DSN" in ran.stderr


@pytest.mark.parametrize(
    ("product", "version", "words"),
    [
        ("CockroachDB CCL v25.1.0", 130000, "do not exclude"),
        (
            "PostgreSQL 8.0.2 on i686-pc-linux-gnu, compiled by GCC, Redshift 1.0",
            80002,
            "do not exclude",
        ),
        ("PostgreSQL 12.4", 120004, "at least 13"),
    ],
)
def test_an_impostor_is_refused(product: str, version: int, words: str) -> None:
    """What these servers say of themselves; none of them can run here."""
    with pytest.raises(ConfigurationError, match=words):
        refuse_impostor(product, version)


def test_postgresql_is_no_impostor() -> None:
    refuse_impostor("PostgreSQL 13.1 on x86_64-pc-linux-gnu", 130001)


@pytest.mark.parametrize("taken", ["last used", "longest idle"])
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_a_pooler_in_transaction_mode_is_refused_each_time(warm: int, taken: str) -> None:
    """Whatever server connections are in its pool, and whichever of them it takes."""
    settings = {"server_round_robin": str(int(taken == "longest idle"))}
    with PostgresServer() as server, PgBouncer(server, settings) as pooler:
        open_server_connections(pooler.dsn, warm)
        said = take(pooler.dsn, "10").splitlines()
        assert len(said) == 10
        for line in said:
            assert line.startswith("ConfigurationError a pooler in transaction mode")
            assert "direct connection (CONCURRENCY_SAFE = {'DSN': 'postgresql://...'})" in line
            assert "pool in session mode" in line

        with psycopg.connect(server.dsn, autocommit=True) as seen:
            assert seen.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_a_refused_pooler_keeps_its_settings() -> None:
    with PostgresServer({"lock_timeout": "7s"}) as server, PgBouncer(server) as pooler:
        assert take(pooler.dsn).startswith("ConfigurationError")

        with psycopg.connect(pooler.dsn, autocommit=True) as client:
            assert client.execute("SHOW lock_timeout").fetchone() == ("7s",)


def test_a_pooler_in_session_mode_is_fine() -> None:
    settings = {"lock_timeout": "7s"}
    with PostgresServer(settings) as server, PgBouncer(server, {"pool_mode": "session"}) as pooler:
        assert take(pooler.dsn, "10").splitlines() == ["the body ran"] * 10

        session = drive(open_session(complete_conninfo(pooler.dsn)))
        assert session.pgconn.exec_(b"SHOW lock_timeout").get_value(0, 0) == b"0"
        session.discard()


def open_server_connections(dsn: str, number: int) -> None:
    """Let a pooler open `number` server connections, and leave them idle in its pool."""
    clients = [psycopg.connect(dsn) for _ in range(number)]
    for client in clients:
        client.execute("SELECT 1")
    for client in clients:
        client.close()


def test_a_script_that_becomes_djangos_takes_no_lock_of_another_database(dsn: str) -> None:
    command = [sys.executable, "-c", LATE_DJANGO, os.environ["DATABASE_URL"]]
    environment = {**bare_environment(), "DATABASE_URL": dsn}

    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "different databases" in process.stdout, process.stderr
