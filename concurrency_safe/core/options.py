"""The options of one acquisition: which values and combinations are legal. Defaults from the settings come later."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeGuard

from .errors import ConfigurationError
from .suggest import nearest

SCOPES = ("auto", "session", "transaction", "detached")

#: Most slots of a key: whoever looks for a free one looks at each.
MOST_SLOTS = 1000


class Unset(Enum):
    """Tells "not given" from None, which means "for ever"."""

    UNSET = "the setting"

    __hash__ = object.__hash__  # an Enum's own is written in Python, and each lock asks for it

    def __repr__(self) -> str:
        """Show a word."""
        return "UNSET"


UNSET = Unset.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class LockOptions:
    """The options of `lock()`, checked.

    `timeout`: seconds; 0 tries once; None waits for ever; UNSET: the setting TIMEOUT. `slots`: most holders.
    `max_waiters`: most waiters, None: any number.

    Raises: ConfigurationError.
    """

    timeout: float | Unset | None = UNSET
    shared: bool = False
    slots: int = 1
    scope: str = "auto"
    using: str | None = None
    backend: object | None = None
    max_waiters: int | None = None

    def __post_init__(self) -> None:
        """Check every value once; past this line nobody does."""
        if not isinstance(self.timeout, Unset):
            check_timeout("timeout", self.timeout)
        if self.scope not in SCOPES:
            raise ConfigurationError(
                f"scope={self.scope!r} is none of {', '.join(map(repr, SCOPES))}{nearest(self.scope, SCOPES)}"
            )
        if not isinstance(self.shared, bool):
            raise ConfigurationError(f"shared={self.shared!r} is neither True nor False")
        check_count("slots", self.slots, at_least=1, at_most=MOST_SLOTS)
        if self.shared and self.slots > 1:
            raise ConfigurationError(
                f"shared=True with slots={self.slots}: readers share a lock without a number, slots have a number; "
                "choose one of them"
            )
        if self.max_waiters is not None:
            check_count("max_waiters", self.max_waiters, at_least=0)
        if self.using is not None and (not isinstance(self.using, str) or not self.using):
            raise ConfigurationError(f"using={self.using!r} is not the name of a database alias")


@lru_cache(maxsize=256, typed=True)  # typed: True is neither 1 nor 1.0
def lock_options(
    timeout: float | Unset | None,
    shared: bool,  # noqa: FBT001 - by position: keywords would cost as much as the checks
    slots: int,
    scope: str,
    using: str | None,
    max_waiters: int | None,
) -> LockOptions:
    """Give the options of a call of `lock()`: mostly those of an earlier call.

    Raises: ConfigurationError. TypeError: one of them is of a kind that can't be remembered, and that no option has.
    """
    return LockOptions(timeout=timeout, shared=shared, slots=slots, scope=scope, using=using, max_waiters=max_waiters)


def check_timeout(name: str, value: object) -> None:
    """Refuse what is no number of seconds, None or 0.

    Raises: ConfigurationError.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(f"{name}={value!r} is not a number of seconds; 0 tries once, None waits for ever")
    if not is_number(value, at_least=0):
        raise ConfigurationError(f"{name}={value!r} is not a duration; give seconds >= 0, or None to wait for ever")


def is_number(value: object, *, at_least: float) -> TypeGuard[float]:
    """Say whether `value` is a number from `at_least` on that a float can hold; neither NaN nor infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return at_least <= value <= sys.float_info.max


def check_count(name: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    """Refuse what is no whole number from `at_least` on, to `at_most`.

    Raises: ConfigurationError.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigurationError(f"{name}={value!r} is not a whole number >= {at_least}")
    if at_most is not None and value > at_most:
        raise ConfigurationError(f"{name}={value} is more than {at_most}, the most there are")
