"""Guards: what can't be guarded is refused at decoration; what can keeps its face."""
# ruff: noqa: ARG005 - what lambdas take matters here

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest

from concurrency_safe import Call, ConfigurationError, Guard, KeyTemplateError, Retry, Skip, concurrency_safe


def buy(sku: str, amount: int = 1) -> int:
    """Buy something."""
    return amount


async def later(sku: str) -> None: ...


def generate(sku: str) -> Iterator[str]:
    yield sku


async def generate_later(sku: str) -> AsyncIterator[str]:
    yield sku


class Shop:
    """Not a function."""

    @classmethod
    def of_all(cls) -> None: ...

    def __call__(self) -> Iterator[str]:
        yield "sku"


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (generate, "generate is a generator function"),
        (generate_later, "generator function"),
        (Shop, "Shop is not a function.*method_decorator"),
        (7, "7 is not a function"),
        (Shop(), "is a generator function"),
        (staticmethod(buy), "buy is a staticmethod: put @staticmethod above the guard"),
        (Shop.__dict__["of_all"], "of_all is a classmethod: put @classmethod above the guard"),
    ],
    ids=repr,
)
def test_what_can_not_be_guarded_is_refused(fn: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        concurrency_safe(key="k")(fn)
    with pytest.raises(ConfigurationError, match=says):
        Guard("k").run(fn)


def test_keys_that_are_equal_are_not_the_same() -> None:
    for key, text in ((("stock", 1), "1"), (("stock", True), "True"), (("stock", Decimal("1.00")), "1.00")):
        assert repr(text) in repr(Guard(key).lock(buy, "a"))
    assert "buy" in repr(Guard(True).lock(buy, "a"))
    with pytest.raises(ConfigurationError):
        Guard(1).lock(buy, "a")


def test_a_bad_key_is_an_error_of_the_line_that_names_the_lock() -> None:
    with pytest.raises(KeyTemplateError, match="half a character"):
        Guard("stock:{sku}").lock(buy, "\udc80")


def test_a_guard_forgets_the_functions_that_it_knows() -> None:
    guard = Guard("k:{sku}")
    for _ in range(200):
        guard.lock(lambda sku: None, "a")
    assert len(guard._templates) <= 64


def test_retry_needs_a_queue() -> None:
    for policy in ("retry", Retry, Retry(delay=2)):
        with pytest.raises(ConfigurationError, match=r"concurrency_safe\.contrib\.celery"):
            concurrency_safe(key="k", on_conflict=policy)(buy)


def test_a_handler_must_be_able_to_take_the_calls_arguments() -> None:
    with pytest.raises(ConfigurationError, match="takes nothing, but it gets the arguments of buy: sku, amount"):
        concurrency_safe(key=True, on_conflict=lambda: 0)(buy)
    with pytest.raises(ConfigurationError, match=r"takes sku, but it gets .*: the conflict, sku, amount"):
        concurrency_safe(key=True, on_conflict=Call(lambda sku: 0, pass_conflict=True))(buy)
    concurrency_safe(key=True, on_conflict=lambda sku, amount: 0)(buy)


def test_only_an_async_function_has_somebody_to_await_its_handler() -> None:
    with pytest.raises(ConfigurationError, match=r"later at .* is `async def`, but buy is not"):
        concurrency_safe(key=True, on_conflict=later)(buy)
    concurrency_safe(key=True, on_conflict=later)(later)


def test_without_a_key_the_forms_are_shown() -> None:
    for arguments, options in (([], {}), ([buy], {}), ([], {"timeout": 1})):
        with pytest.raises(ConfigurationError, match=r'key="stock:\{sku\}"'):
            concurrency_safe(*arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="two keys"):
        concurrency_safe("a", key="b")


def test_a_missing_name_fails_at_decoration() -> None:
    with pytest.raises(KeyTemplateError, match=r"'skew'.*'sku', 'amount'"):
        concurrency_safe("stock:{skew}")(buy)


@pytest.mark.parametrize("key", ["stock:{sku}", ("stock", "{sku}"), True, lambda sku, **_: sku])
def test_a_guarded_function_keeps_its_face(key: Any) -> None:
    guard = concurrency_safe(key=key)
    guarded: Any = guard(buy)

    assert guarded.guard is guard
    assert guarded.__wrapped__ is buy
    assert guarded.__name__ == "buy"
    assert guarded.__doc__ == "Buy something."
    assert inspect.signature(guarded) == inspect.signature(buy)


def test_a_guard_is_a_value() -> None:
    assert Guard("k", timeout=0) == Guard("k", timeout=0)
    assert hash(Guard("k", on_conflict=Skip(1))) == hash(Guard("k", on_conflict=Skip(1)))
    assert Guard("k") != Guard("k", on_conflict="skip")
    with pytest.raises(AttributeError):
        Guard("k").key = "other"  # type: ignore[misc]


def test_a_callable_key_may_be_positional_when_it_is_a_lambda() -> None:
    assert concurrency_safe(lambda sku, **_: sku).lock(buy, "A") is not None


def test_bad_options_fail_at_once() -> None:
    with pytest.raises(ConfigurationError, match="timeout=-1"):
        concurrency_safe("k", timeout=-1)
    with pytest.raises(ConfigurationError, match="is a class"):
        concurrency_safe("k", on_conflict=ValueError)
