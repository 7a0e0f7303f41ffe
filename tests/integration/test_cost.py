"""What an uncontended lock costs: statements, counted in the server's log, and waits for their answers."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from concurrency_safe import lock
from concurrency_safe.core.steps import TURN, SocketWait
from concurrency_safe.postgres import protocol
from concurrency_safe.postgres.protocol import answer
from concurrency_safe.postgres.sql import Statement
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.testing import PostgresServer
from tests.integration.conftest import LIMIT, wait_for
from tests.integration.test_shared_sessions import going_on, session_of, silent

ROUNDS = 10

SESSION = """
import sys
from concurrency_safe import configure, lock
configure(dsn=sys.argv[1])
with lock("warm"):
    pass
for _ in range(10):
    with lock("one"):
        pass
"""

FENCED = """
import sys
import psycopg
from concurrency_safe import configure, lock
from concurrency_safe.postgres.sql import CREATE_FENCE
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    connection.execute(CREATE_FENCE)
configure(dsn=sys.argv[1], fencing=True)
with lock("warm"), lock("warm", "too"):
    pass
for _ in range(10):
    with lock("one"), lock("one"), lock("one", "two"), lock("two"):
        pass
"""

TRANSACTION = """
import django
from django.db import connection, transaction
django.setup()
from concurrency_safe import lock
for _ in range(10):
    with transaction.atomic(), lock("one"):
        connection.cursor().execute("SELECT 'the body'")
"""


def statements_of(program: str) -> list[str]:
    """Run `program` against a server of its own; return every statement that the server saw of it."""
    with PostgresServer(settings={"log_statement": "all"}) as server:
        environment = {
            **os.environ,
            "DATABASE_URL": server.dsn,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
        }
        subprocess.run([sys.executable, "-c", program, server.dsn], check=True, env=environment)
        return re.findall(r"(?:statement|execute [^:]*): (.*)", server.log.read_text())


def test_a_warm_session_lock_is_two_statements() -> None:
    sent = statements_of(SESSION)

    assert (
        sent[-2 * ROUNDS :]
        == [
            "SELECT pg_try_advisory_lock($1::bigint)",
            "SELECT pg_advisory_unlock($1::bigint)",
        ]
        * ROUNDS
    )
    assert len([text for text in sent if "advisory" in text]) == 2 * ROUNDS + 2


def test_a_token_costs_no_statement() -> None:
    sent = statements_of(FENCED)
    texts = [re.sub(r"\(.*", "", text) for text in sent[-4 * ROUNDS :]]

    assert texts == [*["SELECT got, CASE WHEN got THEN nextval"] * 2, *["SELECT pg_advisory_unlock"] * 2] * ROUNDS


def test_a_transaction_lock_is_one_statement() -> None:
    sent = statements_of(TRANSACTION)
    ours = [re.sub(r"\(.*\)", "()", text) for text in sent[-4 * ROUNDS :]]

    assert ours == ["BEGIN", "SELECT pg_try_advisory_xact_lock()", "SELECT 'the body'", "COMMIT"] * ROUNDS


@pytest.mark.parametrize("was_brisk", [False, True])
def test_an_answer_that_is_there_is_not_waited_for(dsn: str, *, was_brisk: bool) -> None:
    with lock("one") as held:
        session = session_of(held)
        session.wire.pace.is_brisk = was_brisk
        sent = time.monotonic()
        session.pgconn.send_query(b"SELECT 1")
        assert select.select([session.pgconn.socket], [], [], LIMIT)[0]
        with pytest.raises(StopIteration):
            next(answer(session.pgconn, sent + LIMIT, session.wire.pace, sent))
        assert session.wire.pace.is_brisk


def test_other_threads_that_run_meanwhile_say_nothing_against_the_pace(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others_run() -> None:
        late = time.monotonic() + protocol.BRISK
        os.kill(session.pid, signal.SIGCONT)
        select.select([session.pgconn.socket], [], [], LIMIT)
        wait_for(lambda: time.monotonic() > late)

    with lock("one") as held:
        session = session_of(held)
        session.wire.pace.is_brisk = True
        monkeypatch.setattr(protocol, "SPIN", LIMIT)  # ours may come late, too
        monkeypatch.setattr(protocol, "_give_way", others_run)
        with silent(session):
            sent = time.monotonic()
            session.pgconn.send_query(b"SELECT 1")
            with pytest.raises(StopIteration):
                next(answer(session.pgconn, sent + LIMIT, session.wire.pace, sent))
        assert session.wire.pace.is_brisk


def test_after_a_while_an_answer_that_is_there_is_waited_for(dsn: str) -> None:
    """Beside a busy thread each statement takes as long as its turn; that is no change of the pace."""
    with lock("one") as held:
        session = session_of(held)
        session.wire.pace.is_brisk = True
        session.wire.pace.spent = TURN
        sent = time.monotonic()
        session.pgconn.send_query(b"SELECT 1")
        assert select.select([session.pgconn.socket], [], [], LIMIT)[0]
        late = time.monotonic() + protocol.BRISK
        wait_for(lambda: time.monotonic() > late)
        steps = answer(session.pgconn, sent + LIMIT, session.wire.pace, sent)
        assert next(steps)
        drive(going_on(steps))
        assert session.wire.pace.is_brisk
        assert session.wire.pace.spent == 0.0


def test_a_first_statement_and_its_preparation_have_one_deadline(dsn: str) -> None:
    with lock("one") as held:
        session = session_of(held)
        steps = protocol.execute(session.wire, Statement(b"new", b"SELECT 1"))
        with silent(session):
            preparing = next(steps)
        assert isinstance(preparing, SocketWait)
        assert select.select([preparing.fd], [], [], LIMIT)[0]
        with silent(session):
            assert next(going_on(steps)) == preparing  # the same deadline
        drive(going_on(steps))


def test_an_answer_that_comes_late_is_not_looked_for_the_next_time(dsn: str) -> None:
    with lock("one") as held:
        session = session_of(held)
        session.wire.pace.is_brisk = True
        with silent(session):
            sent = time.monotonic()
            session.pgconn.send_query(b"SELECT 1")
            steps = answer(session.pgconn, sent + LIMIT, session.wire.pace, sent)
            next(steps)
            late = time.monotonic() + protocol.BRISK
            wait_for(lambda: time.monotonic() > late)
        drive(going_on(steps))
        assert not session.wire.pace.is_brisk
