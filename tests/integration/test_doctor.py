"""`concurrency-safe doctor`: what is wrong with a lock store, and what to do."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from concurrency_safe import LockUnavailable, configure
from concurrency_safe.core.steps import Steps
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres import protocol
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.doctor import Finding, examine
from concurrency_safe.postgres.inspect import session_name
from concurrency_safe.postgres.sql import CREATE_FENCE, CREATE_TICK
from concurrency_safe.spaces import ask, close_idle_sessions
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LockStore, bare_environment, wait_for
from tests.integration.test_cli_run import PROGRAM
from tests.settings import NO_SERVER


def diagnosis(dsn: str) -> tuple[int, str, str]:
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn}
    command = [*PROGRAM[:-1], "doctor"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    return answer.returncode, answer.stdout, answer.stderr


def findings(dsn: str, *, fencing: bool = False, pooler: str | None = None) -> list[Finding]:
    configure(dsn=dsn, pooler=pooler)
    return ask(lambda backend, footing: examine(backend, footing, fencing=fencing))


def test_a_healthy_store(dsn: str) -> None:
    status, out, err = diagnosis(dsn)
    assert (status, err) == (0, "")
    assert {line[:8] for line in out.splitlines()} == {"ok      "}
    assert "it is no standby" in out
    assert "locks are held by sessions of our own" in out


def test_without_a_store(dsn: str) -> None:
    status, out, err = diagnosis(NO_SERVER)
    assert (status, out) == (69, "")
    assert err.startswith("concurrency-safe: the lock store can't be used: the lock store can't be reached")


def test_a_standby_is_named(dsn: str) -> None:
    with PostgresServer() as primary, primary.standby() as standby:
        status, _, err = diagnosis(standby.dsn)
    assert status == 69
    assert "point the DSN at the primary" in err


def test_what_is_missing_is_told_with_the_remedy(dsn: str, store: LockStore) -> None:
    store.connection.execute("DROP TABLE concurrency_safe_tick; DROP SEQUENCE concurrency_safe_fence")
    try:
        status, out, _ = diagnosis(dsn)
        assert status == 0
        assert "advice  the table of ticks, concurrency_safe_tick, is not there; once_per" in out
        assert "        -> python manage.py migrate concurrency_safe, or concurrency-safe init" in out
        assert [one.fact for one in findings(dsn, fencing=True) if one.grave] == [
            "the sequence of fencing tokens, concurrency_safe_fence, is not there; the setting FENCING needs it"
        ]
    finally:
        store.connection.execute(f"{CREATE_TICK}; {CREATE_FENCE}")


def test_a_user_without_privileges(dsn: str, store: LockStore) -> None:
    store.connection.execute("CREATE ROLE plain LOGIN PASSWORD 'dark'")
    theirs = make_conninfo(dsn, user="plain", password="dark")
    try:
        store.connection.execute("GRANT SELECT, UPDATE ON concurrency_safe_tick TO plain")
        seen = findings(theirs, fencing=True)
        assert [(one.remedy, one.grave) for one in seen if one.remedy] == [
            ("GRANT INSERT, DELETE ON TABLE concurrency_safe_tick TO plain", False),
            ("GRANT USAGE ON SEQUENCE concurrency_safe_fence TO plain", True),
        ]
        # The connections of others count, too.
        (connections,) = [one.fact for one in seen if one.fact.startswith("connections: ")]
        assert int(connections.split()[1]) > store.sessions()
        store.connection.execute("REVOKE SELECT ON pg_locks FROM PUBLIC")
        with pytest.raises(LockUnavailable, match="can't be examined: permission denied"):
            findings(theirs)
    finally:
        store.connection.execute("GRANT SELECT ON pg_locks TO PUBLIC")
        configure(dsn=dsn)
        close_idle_sessions()
        wait_for(
            lambda: store.connection.execute("SELECT 1 FROM pg_stat_activity WHERE usename = 'plain'").rowcount == 0
        )
        store.connection.execute("DROP OWNED BY plain; DROP ROLE plain")


def shorten_timeout(backend: PostgresBackend, borrower: Footing) -> Steps[None]:
    """Do to the library's session what a pooler may do that resets settings."""
    session = yield from backend.pool.lend(borrower, (), session_name(None), empty=False)
    yield from protocol.query(session.pgconn, b"SET statement_timeout = '5s'")
    yield from backend.pool.free(borrower)


def test_settings_that_did_not_arrive_are_a_problem(dsn: str) -> None:
    configure(dsn=dsn)
    ask(shorten_timeout)
    (problem,) = [one for one in findings(dsn) if one.grave]
    assert problem.fact == "our sessions have statement_timeout = '5000', which they have set otherwise"


def test_behind_a_pooler_in_transaction_mode(dsn: str) -> None:
    seen = findings(dsn, pooler="transaction")
    assert "locks are held by open transactions, behind a pooler" in [one.fact for one in seen]
    assert not any(one.grave for one in seen)


def test_a_server_that_is_nearly_full() -> None:
    with PostgresServer({"max_connections": "8"}) as server, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(psycopg.connect(server.dsn))
        status, out, _ = diagnosis(server.dsn)
    assert status == 0
    assert "advice  connections: 5 of about 5 in use (100%)\n        -> close some, or raise max_connections\n" in out
