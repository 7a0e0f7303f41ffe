"""The README is executed: every Python block, in order, on a real database, and then each thing that it shows."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import dramatiq
import pytest
from celery import current_app
from django.db import connection, models
from django.test import RequestFactory
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from concurrency_safe import LockAcquireTimeout
from concurrency_safe.conf import Settings
from example.stock.models import Product
from tests.integration.conftest import Rival, db_name, dsn, fresh_library, rival, store

__all__ = ["db_name", "dsn", "fresh_library", "rival", "store"]  # fixtures, for this file

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Account(models.Model):
    """What the README's bank has."""

    user_id = models.IntegerField(unique=True)
    balance = models.IntegerField()
    objects: ClassVar = models.Manager["Account"]()

    class Meta:
        app_label = "readme"

    def __str__(self) -> str:
        return f"{self.user_id}: {self.balance}"


@pytest.fixture
def readme(dsn: str, rival: Rival) -> Iterator[dict[str, Any]]:
    """Execute the blocks in one namespace, as a reader would type them; give what they define."""
    with connection.schema_editor() as editor:
        editor.create_model(Account)
    try:
        Account.objects.create(user_id=7, balance=100)
        Product.objects.create(sku="ABC", stock=10)
        names: dict[str, Any] = {"Account": Account, "Product": Product, "DSN": dsn}
        stub = StubBroker(middleware=[AsyncIO()])
        dramatiq.set_broker(stub)
        stub.emit_before("worker_boot", None)
        names["__name__"] = f"readme_{id(names)}"  # Celery names tasks by it
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - what it is for
        yield names
        stub.emit_after("worker_shutdown", None)
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Account)


def stock() -> int:
    return int(Product.objects.get(sku="ABC").stock)


def test_there_is_something_to_execute() -> None:
    assert len(BLOCKS) >= 9


def test_the_cron_job_runs_on_one_host(readme: dict[str, Any], rival: Rival) -> None:
    job = readme["nightly_report"]
    rival.hold("nightly-report")
    assert job() is None
    rival.let_go()
    try:
        assert [job(), job()] == ["sent", None]
    finally:
        rival.connection.execute("TRUNCATE concurrency_safe_tick")


def test_the_account_is_guarded(readme: dict[str, Any], rival: Rival) -> None:
    assert readme["withdraw"](7, 60) is True
    assert readme["withdraw"](user_id=7, amount=60) is False

    rival.hold("withdraw:user:7")
    readme["withdraw"].__wrapped__(7, 1)  # unguarded it would run
    with pytest.raises(LockAcquireTimeout, match="withdraw:user:7"):
        readme["concurrency_safe"](key="withdraw:user:{user_id}", timeout=0)(readme["withdraw"].__wrapped__)(7, 1)


def test_the_blocks_changed_the_shelf(readme: dict[str, Any]) -> None:
    assert stock() == 10 - 1 + 5
    assert readme["held"].keys == ("(stock/ABC)",)


def test_the_functions_skip_or_answer(readme: dict[str, Any], rival: Rival) -> None:
    day = dt.date(2026, 11, 23)
    assert readme["send_report"](day) == "report of 2026-11-23 sent"
    assert readme["recount"]("A", full=True) == "counted"

    rival.hold("report:2026-11-23")
    assert readme["send_report"](day) is None


def test_the_views_answer_409_while_another_is_inside(readme: dict[str, Any], rival: Rival) -> None:
    request = RequestFactory().post("/")
    before = stock()
    assert readme["buy"](request, sku="ABC").status_code == 200
    assert readme["Shelf"].as_view()(request, sku="ABC").status_code == 200

    rival.hold("stock:ABC")
    assert readme["Shelf"].as_view()(request, sku="ABC").status_code == 409
    assert readme["buy"](request, sku="ABC").status_code == 409
    assert stock() == before - 1


def test_the_tasks_run_and_share_the_key(readme: dict[str, Any], rival: Rival) -> None:
    current_app.finalize()
    assert readme["withdraw_later"].apply((7, 10)).get() is True
    assert readme["restock"].apply(("ABC", 3)).get() == 3

    rival.hold("withdraw:user:7")
    with pytest.raises(LockAcquireTimeout):
        readme["withdraw_later"].apply((7, 10)).get()


def test_the_actors_run_and_share_the_key(readme: dict[str, Any], rival: Rival) -> None:
    assert readme["withdraw_by_actor"](7, 10) is True
    assert readme["restock_by_actor"]("ABC", 3) == 3

    rival.hold("withdraw:user:7")
    rival.hold("stock:ABC")
    with pytest.raises(LockAcquireTimeout):
        readme["withdraw_by_actor"](7, 10)
    assert readme["restock_by_actor"]("ABC", 3) is None


def test_the_guard_skips(readme: dict[str, Any], rival: Rival) -> None:
    assert readme["once"].run(readme["sync"], "north") == "done"

    rival.hold("sync:north")
    assert readme["once"].run(readme["sync"], "north") == "already running"


def test_the_settings_are_those_that_there_are() -> None:
    table = README.split("## Settings")[1].split("## ")[0]
    rows = dict(re.findall(r"\| `([A-Z_]+)` \| `([^`]+)` \|", table))

    assert rows == {name.upper(): repr(getattr(Settings(), name)) for name in Settings.__dataclass_fields__}


def test_the_commands_are_verbs_of_the_makefile() -> None:
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)) <= verbs
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))


def test_the_documents_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
