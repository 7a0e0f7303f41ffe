"""pytest-celery's own API, on local processes, as `pytest_plugins = ["concurrency_safe.testing.celery"]` gives it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pytest_celery import CeleryTestSetup

from concurrency_safe import LockAcquireTimeout
from concurrency_safe.testing.celery import (
    celery_backend,
    celery_broker,
    celery_valkey,
    celery_worker,
    celery_worker_options,
)
from tests.integration.conftest import Rival

# Fixtures: imported for this file alone, where a user's conftest.py would name the plugin.
__all__ = ["celery_backend", "celery_broker", "celery_valkey", "celery_worker", "celery_worker_options"]

APP = """
from celery import Celery
from concurrency_safe.contrib.celery import ConcurrencySafeTask

app = Celery("bank")
app.conf.task_acks_late = app.conf.task_reject_on_worker_lost = True
app.conf.broker_connection_retry_on_startup = True

@app.task(name="withdraw", base=ConcurrencySafeTask, lock_key="withdraw:{user_id}", on_conflict="raise")
def withdraw(user_id, amount):
    return amount
"""


@pytest.fixture
def celery_worker_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_database: str) -> str:
    (tmp_path / "bank_app.py").write_text(APP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DATABASE_URL", worker_database)
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    return "bank_app"


def processes_of(name: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def test_a_task_is_guarded_also_after_a_crash_and_no_process_is_left(
    celery_setup: CeleryTestSetup, worker_database: str
) -> None:
    assert celery_setup.ready(ping=True)
    withdraw = celery_setup.app.signature("withdraw", (7, 60))
    assert withdraw.delay().get(timeout=10) == 60

    rival = Rival(worker_database)
    rival.hold("withdraw:7")
    with pytest.raises(LockAcquireTimeout, match=f"server process {rival.pid}"):
        withdraw.delay().get(timeout=10)

    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    rival.connection.close()
    sent = withdraw.delay()
    celery_setup.worker.restart()
    assert sent.get(timeout=10) == 60
    celery_setup.worker.assert_log_exists("lock 'withdraw:7' is taken")

    node = celery_setup.worker.hostname()
    assert len(processes_of(node)) == 1 + 2  # the worker, and its children
    celery_setup.worker.teardown()
    assert processes_of(node) == []
