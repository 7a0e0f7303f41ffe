"""The pages for those who come from another library are executed: each block of Python, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from concurrency_safe import ConfigurationError, LockAcquireTimeout
from tests.integration.conftest import Rival, db_name, dsn, fresh_library, rival, store

__all__ = ["db_name", "dsn", "fresh_library", "rival", "store"]  # fixtures, for this file

PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"


def execute(page: str, **names: object) -> dict[str, Any]:
    """Execute the blocks of a page in one namespace, with an app that runs its tasks here; give what they define."""
    app = Celery(page, set_as_current=False)
    app.conf.task_always_eager = True
    found: dict[str, Any] = {"app": app, "__name__": page, **names}
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), found)  # noqa: S102 - what it is for
    return found


def test_coming_from_celery_once(rival: Rival) -> None:
    page = execute("coming-from-celery-once", sent_today=set())

    assert page["refresh"].delay(7).get() == "refreshed 7"
    rival.hold("refresh:7")
    assert page["refresh"].delay(7, force=True).get() is None
    assert page["refresh"].delay(8).get() == "refreshed 8"
    assert [page["send_digest"].delay(1).get() for _ in range(2)] == ["sent", "sent already"]


def test_coming_from_celery_singleton(rival: Rival) -> None:
    page = execute("coming-from-celery-singleton", reports={})

    assert page["ship"].delay(7).get() == "shipped 7"
    rival.hold("ship:7")
    with pytest.raises(LockAcquireTimeout):
        page["ship"].delay(7, note="again").get()
    assert page["build_report"].delay("may").get() == page["build_report"].delay("may").get() == "report of may"


def test_coming_from_cache_add(rival: Rival) -> None:
    page = execute("coming-from-cache-add")

    assert page["status"] == "nobody imports it meanwhile"
    rival.hold("import-feed:https://example.org/a")
    assert page["import_feed"].delay("https://example.org/a").get() is None
    assert page["import_feed"].delay("https://example.org/b").get() == "imported https://example.org/b"


@pytest.mark.parametrize(
    ("page", "options"),
    [
        ("coming-from-celery-once", {"once": {"keys": ["account_id"]}}),
        ("coming-from-celery-singleton", {"unique_on": ["order_id"]}),
    ],
)
def test_an_option_left_over_is_named(page: str, options: dict[str, Any]) -> None:
    from concurrency_safe.contrib.celery import ConcurrencySafeTask

    app = Celery(page, set_as_current=False)

    @app.task(base=ConcurrencySafeTask, shared=False, **options)
    def left(order_id: int) -> int:
        return order_id

    with pytest.raises(ConfigurationError, match=f"the option '{next(iter(options))}' does nothing; use lock_key"):
        app.finalize()
