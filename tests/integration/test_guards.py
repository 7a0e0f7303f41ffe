"""Guards at work: each policy, on a lock that another session holds."""

from __future__ import annotations

import pytest

from concurrency_safe import (
    Call,
    Guard,
    LockAcquireTimeout,
    LockUnavailable,
    Retry,
    Skip,
    concurrency_safe,
    configure,
    current_lock,
)
from tests.integration.conftest import Rival


def body(sku: str) -> str:
    held = current_lock()
    assert held is not None
    return f"{held.keys[0]} of {sku}"


def test_a_guard_runs_decorates_and_gives_its_lock(rival: Rival) -> None:
    guard = Guard("stock:{sku}", timeout=0)

    assert guard.run(body, "A") == "stock:A of A"
    assert guard(body)(sku="A") == "stock:A of A"
    with guard.lock(body, "A") as held:
        assert held.keys == ("stock:A",)
        assert not rival.try_hold("stock:A")


@pytest.mark.parametrize(
    ("policy", "result"),
    [
        ("skip", None),
        (Skip("skipped"), "skipped"),
        (lambda sku: f"{sku} busy", "A busy"),
        (Call(lambda conflict, sku: (sku, conflict.key), pass_conflict=True), ("A", "stock:A")),
    ],
    ids=["skip", "Skip", "callable", "Call"],
)
def test_a_conflict_ends_as_the_policy_says(policy: object, result: object, rival: Rival) -> None:
    guarded = concurrency_safe("stock:{sku}", timeout=0, on_conflict=policy)(body)
    assert guarded("A") == "stock:A of A"
    rival.hold("stock:A")

    assert guarded("A") == result
    assert guarded("B") == "stock:B of B"


@pytest.mark.parametrize("policy", ["raise", Retry()], ids=["raise", "retry, with no queue behind"])
def test_a_conflict_is_raised(policy: object, rival: Rival) -> None:
    rival.hold("stock:A")

    with pytest.raises(LockAcquireTimeout, match="stock:A"):
        Guard("stock:{sku}", timeout=0, on_conflict=policy).run(body, "A")


@pytest.mark.parametrize(
    "policy", ["raise", "skip", lambda *_: "busy", Retry()], ids=["raise", "skip", "call", "retry"]
)
def test_a_store_that_is_away_is_no_conflict(policy: object, rival: Rival) -> None:
    configure(dsn="postgresql://nobody@127.0.0.1:1/none")

    with pytest.raises(LockUnavailable):
        Guard("stock:{sku}", timeout=0, on_conflict=policy).run(body, "A")
