"""One text for one value, in every process and after a trip through a message."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.utils.functional import SimpleLazyObject

from concurrency_safe import KeyTemplateError
from concurrency_safe.core.canonical import canonical, canonical_arguments

ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Ratio(float):
    """As numpy's floats do, it shows itself otherwise than a float."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Ratio({float(self)})"


class Amount(int):
    __slots__ = ()

    def __repr__(self) -> str:
        return "something else"


class Model:
    """What the library knows a model instance by."""

    _meta = object()

    def __init__(self, pk: Any) -> None:
        self.pk = pk


#: Earlier in UTC than any datetime.
FIRST_HOUR = dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))
NOON = dt.datetime(2026, 11, 23, 12, 0, tzinfo=dt.timezone.utc)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("abc", "abc"),
        (Text("abc"), "abc"),
        (7, "7"),
        (True, "True"),
        (1.5, "1.5"),
        (Decimal("1.50"), "1.50"),
        (ID, str(ID)),
        (dt.date(2026, 11, 23), "2026-11-23"),
        (dt.time(12, 30), "12:30:00"),
        (dt.timedelta(hours=1), "1:00:00"),
        (dt.datetime(2026, 11, 23, 12, 0), "2026-11-23T12:00:00"),  # noqa: DTZ001 - a naive one is what is tested
        (NOON, "2026-11-23T12:00:00+00:00"),
        (NOON.astimezone(ZoneInfo("Europe/Madrid")), "2026-11-23T12:00:00+00:00"),
        (Color.RED, "red"),
        (Level.HIGH, "3"),
        (Model(7), "7"),
        (Model(ID), str(ID)),
        (SimpleLazyObject(lambda: Model(7)), "7"),
        (SimpleLazyObject(lambda: "abc"), "abc"),
        (SimpleLazyObject(lambda: 7), "7"),
        (SimpleLazyObject(lambda: True), "True"),
        (SimpleLazyObject(lambda: 1.5), "1.5"),
        (Ratio(1.5), "1.5"),
        (Amount(7), "7"),
        (-0.0, "0.0"),
    ],
    ids=repr,
)
def test_a_value_has_one_text(value: object, text: str) -> None:
    assert canonical(value) == text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "strangers"),
        ("", "strangers"),
        (float("nan"), "no number"),
        (float("inf"), "no number"),
        (b"bytes", "bytes in a key"),
        (object(), "object in a key"),
        ([1], "list in a key"),
        (Model(None), "not saved"),
        (SimpleLazyObject(lambda: None), "strangers"),
        (FIRST_HOUR, "no time in UTC"),
    ],
    ids=repr,
)
def test_what_has_no_text_is_refused(value: object, says: str) -> None:
    with pytest.raises(KeyTemplateError, match=says):
        canonical(value)


def test_arguments_are_tagged_and_sorted() -> None:
    texts = [canonical_arguments([value]) for value in (1, "1", True, None, 1.0, "True", [1], {"1": 1})]

    assert len(set(texts)) == len(texts)
    assert canonical_arguments({"b": 1, "a": (2, 3)}) == canonical_arguments({"a": [2, 3], "b": 1})
    assert canonical_arguments({Color.RED: Model(7)}) == '{"red":7}'


def test_arguments_are_seen_through_what_wraps_them() -> None:
    lazy = SimpleLazyObject(lambda: {"n": SimpleLazyObject(lambda: 5), "r": Ratio(1.5)})

    assert canonical_arguments([lazy]) == '[{"n":5,"r":1.5}]'
    assert canonical_arguments([SimpleLazyObject(lambda: None), SimpleLazyObject(lambda: False)]) == "[null,false]"
    assert canonical_arguments([Model((1, "a"))]) == '[[1,"a"]]'  # a composite primary key
    assert canonical_arguments([-0.0]) == canonical_arguments([0.0])


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)

    with pytest.raises(KeyTemplateError, match="holds itself"):
        canonical_arguments(endless)


def test_arguments_are_the_same_after_a_message() -> None:
    given = {"id": ID, "day": dt.date(2026, 11, 23), "price": Decimal("1.5"), "tags": ("a", "b"), "color": Color.RED}

    assert canonical_arguments(given) == canonical_arguments(json.loads(canonical_arguments(given)))


@pytest.mark.parametrize("value", [b"bytes", {1: 2}, {1, 2}, object(), float("nan"), [object()]], ids=repr)
def test_arguments_without_a_canonical_form_are_refused(value: object) -> None:
    with pytest.raises(KeyTemplateError):
        canonical_arguments({"value": value})
