"""The demo's verdict can fail: each promise, broken alone, is named with the door that broke it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from example.demo.report import table
from example.demo.verdict import Row, broken_promises, overlaps

UNGUARDED = Row(
    door="view, unguarded",
    guarded=False,
    stock=8,
    left=6,
    requests=10,
    sold=10,
    sold_out=0,
    logged=10,
    overlaps=9,
    conflicts=None,
    seconds=0.1,
)
GUARDED = Row(
    door="view, guarded",
    guarded=True,
    stock=8,
    left=0,
    requests=10,
    sold=8,
    sold_out=2,
    logged=8,
    overlaps=0,
    conflicts=7,
    seconds=0.3,
)


def test_a_race_without_guard_and_none_with_it_is_a_success() -> None:
    broken = broken_promises([UNGUARDED, GUARDED])

    assert broken == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"left": -2}, "no update was lost, so the race did not show"),
        ({"overlaps": 0}, "no sales overlapped, so the race did not show"),
        ({"sold": 9, "logged": 9}, "9 of 10 requests were answered"),
        ({"logged": 11}, "10 answers say sold, and the log has 11 sales"),
    ],
)
def test_each_fault_of_an_unguarded_door_is_named(change: dict[str, Any], sentence: str) -> None:
    broken = broken_promises([replace(UNGUARDED, **change), GUARDED])

    assert broken == [f"view, unguarded: {sentence}"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"left": 1}, "8 were sold, but the stock went from 8 to 1: 1 lost"),
        ({"left": -1}, "8 were sold, but the stock went from 8 to -1: -1 lost"),
        ({"overlaps": 2}, "2 sales overlapped another one"),
        ({"conflicts": 0}, "no request met another one, so nothing was shown"),
        ({"conflicts": None}, "no request met another one, so nothing was shown"),
        ({"sold_out": 1}, "9 of 10 requests were answered"),
        (
            {"sold_out": 1, "trouble": "HTTP status 500"},
            "9 of 10 requests were answered (HTTP status 500)",
        ),
        ({"logged": 7}, "8 answers say sold, and the log has 7 sales"),
        (
            {"sold": 9, "sold_out": 1, "logged": 9, "left": -1},
            "9 were sold to 10 requests with 8 in stock, not 8",
        ),
        (
            {"sold": 7, "sold_out": 3, "logged": 7, "left": 1},
            "7 were sold to 10 requests with 8 in stock, not 8",
        ),
        (
            {"stock": 0, "sold": 0, "sold_out": 10, "logged": 0},
            "0 were sold to 10 requests with 0 in stock, not 0",
        ),
    ],
)
def test_each_fault_of_a_guarded_door_is_named(change: dict[str, Any], sentence: str) -> None:
    broken = broken_promises([UNGUARDED, replace(GUARDED, **change)])

    assert broken == [f"view, guarded: {sentence}"]


def test_a_table_that_compares_nothing_is_no_success() -> None:
    assert broken_promises([GUARDED]) == ["the table lacks an unguarded door"]
    assert broken_promises([UNGUARDED]) == ["the table lacks a guarded door"]


@pytest.mark.parametrize(
    ("sales", "count"),
    [
        ([], 0),
        ([(0, 2), (2, 4), (5, 6)], 0),
        ([(0, 3), (2, 4)], 1),
        ([(2, 4), (0, 3)], 1),
        ([(0, 9), (1, 2), (3, 4)], 2),
    ],
    ids=["none", "one after the other", "two", "two, out of order", "two inside a long one"],
)
def test_overlaps_counts_sales_that_began_before_an_earlier_one_had_ended(
    sales: list[tuple[int, int]], count: int
) -> None:
    midnight = datetime(2030, 1, 1, tzinfo=timezone.utc)
    hours = [(midnight + timedelta(hours=a), midnight + timedelta(hours=b)) for a, b in sales]

    assert overlaps(hours) == count


def test_the_table_has_a_line_for_each_door_within_100_columns() -> None:
    long = replace(GUARDED, door="task, ConcurrencySafeTask", stock=1000, requests=1000, sold=1000)

    lines = table([UNGUARDED, long]).splitlines()

    assert [line.split("  ")[0] for line in lines if line[0] != "-"] == [
        "door",
        "view, unguarded",
        "task, ConcurrencySafeTask",
    ]
    assert max(map(len, lines)) <= 100
