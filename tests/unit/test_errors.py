"""Errors cross processes: pickled by queues, rebuilt from JSON by result backends."""

from __future__ import annotations

import json
import pickle

import pytest

import concurrency_safe
from concurrency_safe.core import errors

PLAIN = [
    errors.ConcurrencySafeError,
    errors.LockLost,
    errors.LockNotHeld,
    errors.LockInTransaction,
    errors.LockReentrancyError,
    errors.LockCapacityError,
    errors.LockUnavailable,
    errors.KeyTemplateError,
    errors.ConfigurationError,
]
TIMEOUTS = [errors.LockAcquireTimeout, errors.LockDeadlock]
EXAMPLES = [
    *(kind("what happened", "stock:ABC") for kind in PLAIN),
    *(kind("what happened") for kind in PLAIN),
    *(kind() for kind in PLAIN),
    *(kind(None, "stock:ABC", 2.0, 2.003, "web-3 pid 7") for kind in TIMEOUTS),
    *(kind("what happened", "stock:ABC") for kind in TIMEOUTS),
    *(kind() for kind in TIMEOUTS),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_an_error_survives_the_trip(error: errors.ConcurrencySafeError) -> None:
    for copy in (
        pickle.loads(pickle.dumps(error)),  # noqa: S301 - our own bytes
        type(error)(*error.args),
        type(error)(*json.loads(json.dumps(error.args))),
    ):
        assert type(copy) is type(error)
        assert copy.args == error.args
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", [*PLAIN, *TIMEOUTS])
def test_every_error_has_one_root_and_always_says_something(kind: type[errors.ConcurrencySafeError]) -> None:
    assert issubclass(kind, concurrency_safe.ConcurrencySafeError)
    assert getattr(concurrency_safe, kind.__name__) is kind
    assert str(kind())


def test_builtin_kin() -> None:
    assert issubclass(errors.LockAcquireTimeout, TimeoutError)
    assert issubclass(errors.KeyTemplateError, ValueError)
    assert issubclass(errors.ConfigurationError, ValueError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("k", 0, 0.001, "A"), "lock 'k' is held by A; tried once (timeout=0)"),
        (("k", 2.0, 2.004, "A"), "lock 'k' is held by A; gave up after 2 s (timeout=2)"),
        (("k", None, None, None), "lock 'k' is held by somebody else; gave up"),
    ],
)
def test_a_conflict_says_which_lock_who_and_how_long(arguments: tuple[object, ...], says: str) -> None:
    error = errors.LockAcquireTimeout(None, *arguments)  # type: ignore[arg-type]

    assert str(error) == says
    assert (error.key, error.timeout, error.waited, error.holder) == arguments


def test_a_timeout_without_a_number_waited_for_ever() -> None:
    assert str(errors.LockAcquireTimeout("said", "k")) == "said"


def test_a_conflict_is_no_error_of_the_operating_system() -> None:
    """TimeoutError is an OSError, which reads two arguments as errno and strerror."""
    error = errors.LockAcquireTimeout("said", "k", 2.0)

    assert (error.errno, error.strerror, error.filename) == (None, None, None)


def test_an_error_without_a_message_says_its_meaning_in_one_line() -> None:
    assert str(errors.ConcurrencySafeError()) == "The root of the library's errors"
    assert str(errors.LockNotHeld()) == "What needs a lock runs without it"
    assert str(errors.LockAcquireTimeout()) == "a lock is held by somebody else; gave up"


def test_long_waits_are_readable() -> None:
    error = errors.LockAcquireTimeout(None, "k", 1234567.0, 1234567.4)

    assert str(error).endswith("gave up after 1234567 s (timeout=1234567)")
