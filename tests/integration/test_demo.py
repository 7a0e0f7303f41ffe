"""`python -m example.demo` shows what it promises, and leaves nothing running however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from concurrency_safe import LockUnavailable
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import StoreOptions
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.census import LockRow, take_census
from concurrency_safe.postgres.waiting import drive
from tests.integration.conftest import wait_for

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "example.demo", "--short"]
#: Seconds after which everything that a killed demo had started has to be gone.
END_LIMIT = 5.0

DOORS = {
    "view, unguarded": False,
    "view, select_for_update": True,
    "view, @concurrency_safe": True,
    "view, 409 and try again": True,
    "scripts, with lock(...)": True,
    "cron, run --tick=...": True,
    "task, unguarded": False,
    "task, ConcurrencySafeTask": True,
    "actor, unguarded": False,
    "actor, lock_key=...": True,
}
#: The locks of the doors that hold one for long enough to be seen.
GUARDED_KEYS = {f"stock:{door}" for door in ("view-guarded", "view-or-busy", "script", "task-guarded", "actor-guarded")}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_unguarded_doors_lose_updates_and_guarded_doors_lose_none(dsn: str, tmp_path: Path) -> None:
    file, output = tmp_path / "report.json", tmp_path / "output"
    before = databases()

    with output.open("w") as log:
        demo = subprocess.Popen([*DEMO, "--json", file], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: databases() != before or demo.poll() is not None)
        seen = locks_until_the_end(demo, make_conninfo(dsn, dbname=(databases() - before).pop()))
    stdout = output.read_text()
    assert demo.returncode == 0, stdout
    assert databases() == before

    # Who has ended before the question came can tell nothing.
    told = [row for row in seen if row.key is not None]
    assert len(seen) - len(told) <= len(seen) / 50
    assert all(row.number == lock_key(row.key).number for row in told if row.key)
    assert {row.key for row in told if row.held} >= GUARDED_KEYS
    assert "stock:script" in {row.key for row in told if not row.held}
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert {row["door"]: row["guarded"] for row in rows} == DOORS
    for row in rows:
        assert f"\n{row['door']}  " in stdout
        decrease = row["stock"] - row["left"]
        assert row["sold"] + row["sold_out"] == row["requests"]
        if row["guarded"]:
            assert row["sold"] == decrease == min(row["stock"], row["requests"]) > 0
            assert row["conflicts"] > 0
            assert row["overlaps"] == 0
        else:
            assert row["sold"] > decrease
            assert row["overlaps"] > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_demo_leaves_no_process() -> None:
    # Its servers shall be its own: what they leave is what is looked for.
    given = {"DATABASE_URL", "CELERY_BROKER_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    with subprocess.Popen(DEMO, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout
        assert any("Celery workers answer" in line for line in demo.stdout)
        started = descendants(demo.pid)
        # PostgreSQL, Valkey, gunicorn and its two, Celery and its four, twice: each with who ends it.
        assert len(started) > 20

        demo.kill()

        wait_for(lambda: not started & set(processes()), END_LIMIT)


def locks_until_the_end(demo: subprocess.Popen[bytes], dsn: str) -> list[LockRow]:
    """Look at the locks of a demo, as `concurrency-safe locks --json` does, again and again while it runs."""
    backend, footing = PostgresBackend(dsn, StoreOptions()), Footing(None)
    seen: list[LockRow] = []
    while demo.poll() is None:
        try:
            seen += drive(take_census(backend, footing, [])).locks
            demo.wait(0.05)
        except subprocess.TimeoutExpired:
            pass
        except LockUnavailable:  # its database is not there yet, or not any more
            drive(backend.undo(footing, ()))
    backend.close()
    return seen


def databases() -> set[str]:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


def descendants(pid: int) -> set[tuple[int, str]]:
    """Return the processes that `pid` started, and those that they started."""
    parents = processes()
    found = {process for process, parent in parents.items() if parent == pid}
    for child, _ in set(found):
        found |= descendants(child)
    return found


def processes() -> dict[tuple[int, str], int]:
    """Return the parent of every process that runs, each named by its pid and its start time."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, fields = stat.read_text().rpartition(") ")
        except OSError:  # it has just ended
            continue
        state, parent, *rest = fields.split()
        if state != "Z":
            found[int(stat.parent.name), rest[17]] = int(parent)
    return found
