"""What a tick is: periods and scheduled times, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from concurrency_safe import ConfigurationError
from concurrency_safe.core.ticks import TickRule, tick_rule


@pytest.mark.parametrize(
    ("once_per", "period", "grain"),
    [
        ("minute", 60, 60),
        ("hour", 3600, 60),
        ("day", 86400, 60),
        ("90s", 90, 90),
        ("120s", 120, 60),
        ("1s", 1, 1),
        ("604800s", 604800, 60),
    ],
)
def test_a_period_and_how_exact_its_schedule_is(once_per: str, period: int, grain: int) -> None:
    rule = tick_rule(once_per)
    assert rule == TickRule(period)
    assert rule.grain == grain


@pytest.mark.parametrize(
    "tick",
    [
        "1774746000",
        1774746000,
        "2026-03-29T01:00:00Z",
        "2026-03-29T01:00:00z",
        "2026-03-29T02:00:00+01:00",
        "2026-03-29 01:00:00.000+00:00",
    ],
)
def test_a_scheduled_time_is_one_point_in_time(tick: Any) -> None:
    assert tick_rule(None, tick, retry_failed=True) == TickRule(None, 1774746000.0, retry_failed=True)


def test_without_a_period_and_a_time_there_is_no_rule() -> None:
    assert tick_rule(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("minutes",), "did you mean 'minute'"),
        (("0s",), "once_per='0s' is none of"),
        (("99999999999s",), "once_per="),
        (("9999999999s",), "once_per="),
        (("1.5s",), "once_per="),
        (("٣s",), "once_per="),
        ((60,), "once_per=60"),
        ((None, "2026-03-29T01:00:00"), "with its offset"),
        ((None, "soon"), "tick='soon' is no point in time"),
        ((None, ""), "tick='' is no point in time"),
    ],
)
def test_what_is_neither_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tick_rule(*arguments)


def test_a_retry_needs_ticks() -> None:
    with pytest.raises(ConfigurationError, match="give once_per as well"):
        tick_rule(None, retry_failed=True)
