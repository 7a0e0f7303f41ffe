"""Options and policies: what is legal, and what an error says."""

from __future__ import annotations

from typing import Any

import pytest

from concurrency_safe import Call, ConfigurationError, Raise, Retry, Skip, lock
from concurrency_safe.core.options import UNSET, LockOptions
from concurrency_safe.core.policies import resolve_policy


@pytest.mark.parametrize("timeout", [0, 0.5, 3, None, UNSET])
def test_durations_are_seconds_none_or_zero(timeout: Any) -> None:
    assert LockOptions(timeout=timeout).timeout == timeout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": -1}, "timeout=-1 is not a duration"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "None to wait for ever"),
        ({"timeout": 10**400}, "is not a duration"),
        ({"timeout": True}, "timeout=True is not a number of seconds"),
        ({"timeout": "3"}, "timeout='3'"),
        ({"scope": "sesion"}, "did you mean 'session'"),
        ({"shared": 1}, "shared=1"),
        ({"slots": 0}, "slots=0 is not a whole number >= 1"),
        ({"slots": True}, "slots=True"),
        ({"slots": 1.5}, "slots=1.5"),
        ({"slots": 1001}, "slots=1001 is more than 1000"),
        ({"slots": 2, "shared": True}, "shared=True with slots=2"),
        ({"max_waiters": -1}, "max_waiters=-1"),
        ({"using": ""}, "using=''"),
        ({"using": 7}, "using=7"),
        ({"timeout": [3]}, r"timeout=\[3\] is not a number of seconds"),
        ({"scope": {}}, "scope={} is none of"),
    ],
    ids=repr,
)
def test_a_bad_option_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        LockOptions(**options)
    for _ in range(2):  # nor is it remembered
        with pytest.raises(ConfigurationError, match=says):
            lock("one", **options)


def test_options_that_are_equal_are_not_the_same() -> None:
    lock("one", slots=1)
    with pytest.raises(ConfigurationError, match="slots=True"):
        lock("one", slots=True)


def test_good_options_are_kept() -> None:
    options = LockOptions(scope="detached", using="other", max_waiters=0)

    assert (options.scope, options.using, options.max_waiters) == ("detached", "other", 0)
    assert repr(UNSET) == "UNSET"


def handler() -> None: ...


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("raise", Raise()),
        ("skip", Skip()),
        ("retry", Retry()),
        (Raise, Raise()),
        (Skip, Skip()),
        (Retry, Retry()),
        (Skip(7), Skip(7)),
        (handler, Call(handler)),
        (Call(handler, pass_conflict=True), Call(handler, pass_conflict=True)),
    ],
    ids=repr,
)
def test_a_policy_has_short_forms(value: object, policy: object) -> None:
    assert resolve_policy(value) == policy


class Foreign(Exception):
    pass


Foreign.__name__ = Foreign.__qualname__ = "Retry"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("retri", "did you mean 'retry'"),
        (None, "no policy"),
        (7, "no policy"),
        (ValueError, "ValueError is a class;"),
        (ValueError("x"), "is an exception;"),
        (Foreign, "not the Retry of concurrency_safe"),
        (Foreign(), "not the Retry of concurrency_safe"),
        (Call, "Call is a class"),
    ],
    ids=repr,
)
def test_what_is_no_policy_is_refused(value: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        resolve_policy(value)


@pytest.mark.parametrize(
    "options",
    [
        {"delay": -1},
        {"delay": "1"},
        {"delay": True},
        {"factor": 0.5},
        {"max_delay": float("nan")},
        {"max_wait": float("inf")},
        {"limit": -1},
        {"max_wait": 10**400},
        {"jitter": 1},
        {"delay": 5, "max_delay": 1},
    ],
    ids=repr,
)
def test_a_bad_retry_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Retry"):
        Retry(**options)


def test_call_needs_something_to_call() -> None:
    with pytest.raises(ConfigurationError, match="something to call"):
        Call(None)  # type: ignore[arg-type]


def test_delays_grow_up_to_a_maximum_and_jitter_takes_at_most_half() -> None:
    steady = Retry(delay=1, max_delay=5, jitter=False)
    assert [steady.next_delay(n, lambda: 0.5) for n in range(5)] == [1, 2, 4, 5, 5]
    assert steady.next_delay(10**6, lambda: 0.5) == 5
    assert Retry(delay=0).next_delay(10**6, lambda: 0.5) == 0

    jittered = Retry(delay=1, max_delay=5)
    assert jittered.next_delay(1, lambda: 0.0) == 1
    assert jittered.next_delay(1, lambda: 0.999) == pytest.approx(2, abs=0.01)


def test_a_budget_is_tries_or_seconds_or_none() -> None:
    assert Retry(limit=2).is_spent(2, 0)
    assert not Retry(limit=2).is_spent(1, 0)
    assert Retry(max_wait=10).is_spent(0, 10)
    assert not Retry(max_wait=None).is_spent(10**6, 10**9)
