"""What an uncontended lock costs, counted in the server's log."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from concurrency_safe.testing import PostgresServer

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


def test_a_transaction_lock_is_one_statement() -> None:
    sent = statements_of(TRANSACTION)
    ours = [re.sub(r"\(.*\)", "()", text) for text in sent[-4 * ROUNDS :]]

    assert ours == ["BEGIN", "SELECT pg_try_advisory_xact_lock()", "SELECT 'the body'", "COMMIT"] * ROUNDS
