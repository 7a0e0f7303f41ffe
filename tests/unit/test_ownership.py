"""Who of a process may ask the store for a key, and when; the store is played by the test."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.sessions import Request
from concurrency_safe.ownership import Claim, Footing, Owner, Ownership


class Session:
    """What a backend writes down about its session."""

    blocked = False


def enter(claims: Ownership, *, shared: bool = False, slots: int = 1) -> tuple[Footing, Generator[Any, Any, Any]]:
    """Begin an acquisition with timeout=0, for an owner of its own."""
    footing = Footing(None)
    footing.session = Session()
    request = Request((lock_key("k"),), shared, slots, time.monotonic(), 0, None)
    return footing, claims.enter(footing, request, Owner(footing, None))


def result(steps: Generator[Any, Any, Any]) -> Claim | None:
    """Go on; fail the test when `steps` waits."""
    with pytest.raises(StopIteration) as stop:
        next(steps)
    claim: Claim | None = stop.value.value
    return claim


@pytest.mark.parametrize("kind", [{"shared": True}, {"slots": 3}])
def test_one_try_waits_for_the_answer_to_another_of_its_kind(kind: dict[str, Any]) -> None:
    claims = Ownership(10)
    first, steps = enter(claims, **kind)
    assert result(steps) is None
    second, waiting = enter(claims, **kind)
    third, waiting_too = enter(claims, **kind)
    next(waiting)
    next(waiting_too)
    claims.confirm(first)
    assert result(waiting) is None
    claims.confirm(second)
    assert result(waiting_too) is None
    claims.confirm(third)


def test_one_try_does_not_wait_for_who_waits_in_the_server_or_holds() -> None:
    claims = Ownership(10)
    first, steps = enter(claims, slots=2)
    assert result(steps) is None
    first.session.blocked = True
    second, steps = enter(claims, slots=2)
    assert result(steps) is first.claims[0]
    claims.leave(second.claims[0])
    first.session.blocked = False
    claims.confirm(first)
    second, steps = enter(claims, slots=2)
    assert result(steps) is None
    claims.confirm(second)
    _, steps = enter(claims, slots=2)
    assert result(steps) is first.claims[0]


def test_one_try_does_not_wait_behind_one_of_another_kind() -> None:
    claims = Ownership(10)
    _, steps = enter(claims, shared=True)
    assert result(steps) is None
    writer = Footing(None)
    waiting = claims.enter(writer, Request((lock_key("k"),), False, 1, None, None, None), Owner(writer, None))
    next(waiting)
    _, steps = enter(claims, shared=True)
    assert result(steps) is not None
