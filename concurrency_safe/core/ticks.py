"""What a tick is: one scheduled run of a job, which hosts whose clocks differ must agree about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone

from .errors import ConfigurationError
from .suggest import nearest

#: Seconds of the periods that have a name.
_NAMED = {"minute": 60, "hour": 3600, "day": 86400}

#: Seconds between two moments at which cron can start a job.
CRON_GRAIN = 60

#: PostgreSQL's timestamps end before this many seconds (a period of 100 years is a mistake, anyway).
_LONGEST = 100 * 366 * 86400


@dataclass(frozen=True, slots=True)
class TickRule:
    """Which runs are the same tick.

    `period`: seconds, one run in each (of UTC; a day is a day of UTC); None: `tick` itself is the identity. `tick`:
    the scheduled time in seconds since 1970; None: what the database's clock says, rounded to `grain`.
    `retry_failed`: whether a tick is run again whose run crashed or failed.
    """

    period: int | None
    tick: float | None = None
    retry_failed: bool = False

    @property
    def grain(self) -> int:
        """Seconds between two moments at which a scheduler starts the job: a clock may be wrong by half of them.

        Cron starts jobs at whole minutes, so these are rounded to; a period that is no number of minutes is some other
        scheduler's, and is rounded to itself.
        """
        period = self.period or CRON_GRAIN
        return period if period % CRON_GRAIN else CRON_GRAIN


def tick_rule(once_per: object, tick: object = None, *, retry_failed: bool = False) -> TickRule | None:
    """Read `once_per` ("minute", "hour", "day", "<n>s") and `tick` (see `tick_time`); None: neither is given.

    Raises: ConfigurationError.
    """
    period = None if once_per is None else _period(once_per)
    if period is None and tick is None:
        if retry_failed:
            raise ConfigurationError("retrying failed ticks needs ticks: give once_per as well")
        return None
    return TickRule(period, None if tick is None else tick_time(tick), retry_failed)


def _period(once_per: object) -> int:
    if isinstance(once_per, str):
        if once_per in _NAMED:
            return _NAMED[once_per]
        match = re.fullmatch(r"([0-9]{1,10})s", once_per, re.ASCII)
        if match and 0 < int(match[1]) <= _LONGEST:
            return int(match[1])
    raise ConfigurationError(
        f"once_per={once_per!r} is none of 'minute', 'hour', 'day', or a number of seconds such as '90s'"
        f"{nearest(once_per, _NAMED)}"
    )


def tick_time(tick: object) -> float:
    """Read a scheduled time: ISO 8601 with its offset ("2026-03-29T01:30:00+01:00"), or seconds since 1970.

    Raises: ConfigurationError.
    """
    text = str(tick)
    if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII):
        return float(text)
    try:
        # Python 3.10 knows no Z.
        moment = datetime.fromisoformat(re.sub(r"[Zz]$", "+00:00", text))
        seconds = None if moment.tzinfo is None else moment.astimezone(timezone.utc).timestamp()
    except (ValueError, OverflowError):
        seconds = None
    if seconds is None:
        raise ConfigurationError(
            f"tick={text!r} is no point in time: give ISO 8601 with its offset (2026-03-29T01:30:00Z), or seconds "
            "since 1970 (date +%s)"
        )
    return seconds
