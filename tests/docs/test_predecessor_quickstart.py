"""The predecessor's quickstart runs unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import RequestFactory

from tests.integration.conftest import Rival, db_name, dsn, fresh_library, rival, store

__all__ = ["db_name", "dsn", "fresh_library", "rival", "store"]  # fixtures, for this file

QUICKSTART = """
from concurrency_safe import concurrency_safe, lock, LockAcquireTimeout
from django.http import JsonResponse

balance = {1: 100}

@concurrency_safe(key="withdraw:user:{user_id}")
def withdraw(user_id, amount):
    balance[user_id] -= amount
    return balance[user_id]

def restock():
    with lock("stock:ABC"):
        return "restocked"

def busy(request, sku):
    return JsonResponse({"detail": "busy"}, status=409)

@concurrency_safe(key="stock:{sku}", on_conflict=busy)
def buy(request, sku):
    return JsonResponse({"detail": "sold"})

def try_restock():
    try:
        return restock()
    except LockAcquireTimeout:
        return "busy"
"""


@pytest.fixture
def quickstart(dsn: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "quickstart"}
    exec(compile(QUICKSTART, "quickstart", "exec"), names)  # noqa: S102 - what it is for
    return names


def test_when_it_is_free(quickstart: dict[str, Any]) -> None:
    assert quickstart["withdraw"](1, 30) == 70
    assert quickstart["withdraw"](user_id=1, amount=30) == 40
    assert quickstart["try_restock"]() == "restocked"
    assert quickstart["buy"](RequestFactory().post("/"), "ABC").status_code == 200


def test_when_it_is_taken(quickstart: dict[str, Any], rival: Rival) -> None:
    rival.hold("stock:ABC")

    assert quickstart["try_restock"]() == "busy"
    assert quickstart["buy"](RequestFactory().post("/"), sku="ABC").status_code == 409
