"""Keys: their numbers are frozen, their texts tell them apart."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrency_safe import KeyTemplateError
from concurrency_safe.core.keys import LockKey, Rendered, lock_key

#: These must never change: hosts on different releases have to exclude each other.
VECTORS: list[tuple[object, str, int]] = [
    ("stock:ABC", "", -6624288163605018330),
    ("stock:ABC", "blue", -8874037363159279605),
    ("größe:ß\u2028🔒", "", -6332778796271141520),
    ("größe:ß🔒", "", -36495001482943636),
    (("stock", "ABC"), "", 2237666906375377921),
    (("stock", 7), "blue", 5716566615594271497),
    (("stockABC",), "", 8516036208344023836),
    ("stock/ABC", "", 8415740916160833788),
]

TEXTS = st.text(min_size=1, max_size=20).filter(
    lambda text: text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
)


@pytest.mark.parametrize(("key", "namespace", "number"), VECTORS)
def test_the_numbers_are_frozen(key: str | tuple[object, ...], namespace: str, number: int) -> None:
    assert lock_key(key, namespace).number == number


@settings(max_examples=50)
@given(TEXTS.map(Rendered))
def test_a_number_is_an_int64_and_stable(text: str) -> None:
    number = lock_key(text).number

    assert -(2**63) <= number < 2**63
    assert lock_key(text).number == number


@settings(max_examples=50)
@given(st.lists(TEXTS.map(Rendered), min_size=1, max_size=3), st.lists(TEXTS.map(Rendered), min_size=1, max_size=3))
def test_no_two_tuples_meet_and_none_is_a_text(one: list[str], other: list[str]) -> None:
    first, second = lock_key(tuple(one)), lock_key(tuple(other))

    assert (first == second) == (one == other)
    assert (first.text == second.text) == (one == other)
    assert first.number != lock_key(Rendered(first.text)).number


def test_parts_are_rendered_and_readable() -> None:
    assert lock_key(("stock", 7)).text == "(stock/7)"
    assert lock_key(("a/b", "c\\d")).text == r"(a\/b/c\\d)"
    assert lock_key(("stock", 7)) == lock_key(("stock", "7"))


def test_a_namespace_is_another_lock() -> None:
    assert lock_key("k", "blue").number != lock_key("k", "green").number != lock_key("k").number


def test_a_key_is_its_own_key() -> None:
    key = LockKey("k", 1)

    assert lock_key(key) is key


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "must not be empty"),
        ((), "no parts"),
        (("a", ""), "strangers"),
        (("a", None), "strangers"),
        ("stock:{sku}", "forgotten f"),
        ("stock:{user.pk!s:>3}", "forgotten f"),
        (("stock", "{sku}"), "forgotten f"),
        ("half \ud800", "half a character"),
        (7, "not int"),
        (["a"], "not list"),
    ],
)
def test_what_is_no_key_is_refused(key: object, says: str) -> None:
    with pytest.raises(KeyTemplateError, match=says):
        lock_key(key)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a{}b", "{1}", '{"json": 1}', "{", "}{"])
def test_braces_that_are_no_field_are_fine(text: str) -> None:
    assert lock_key(text).text == text
    assert lock_key(Rendered("{sku}")).text == "{sku}"


def test_a_text_may_come_in_a_wrapper() -> None:
    class Name(str, Enum):
        STOCK = "stock:ABC"

    wrappers: list[Any] = [Name.STOCK, SimpleLazyObject(lambda: "stock:ABC")]
    for wrapped in wrappers:
        key = lock_key(wrapped)
        assert key == lock_key("stock:ABC")
        assert type(key.text) is str
