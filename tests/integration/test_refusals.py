"""Stores on which a lock would not exclude are refused, with the remedy: the body never runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from concurrency_safe import ConfigurationError
from concurrency_safe.postgres.session import refuse_impostor
from concurrency_safe.testing import PostgresServer

TAKE = """
import sys
from concurrency_safe import ConcurrencySafeError, configure, lock
configure(dsn=sys.argv[1])
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
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "DJANGO_SETTINGS_MODULE")
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


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
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "DJANGO_SETTINGS_MODULE")
    }
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
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
