"""What happens on a conflict, as values: Raise, Skip, Call, Retry.

Who carries them out is not said here: `guards` matches them, and an adapter says what *retry* means in its framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .errors import ConfigurationError
from .options import check_count, is_number
from .suggest import nearest

#: The smallest part of a delay that jitter leaves: enough to keep a busy key from being asked in a tight loop.
JITTER_FLOOR = 0.5


@dataclass(frozen=True, slots=True)
class Raise:
    """Raise the `LockAcquireTimeout`."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Don't run the body; the call's result is `result`."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class Call:
    """Call `handler` with the call's arguments; its result is the call's.

    `pass_conflict`: True puts the `LockAcquireTimeout` before them.
    """

    handler: Callable[..., Any]
    pass_conflict: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not callable(self.handler):
            raise ConfigurationError(f"Call({self.handler!r}) needs something to call")


@dataclass(frozen=True, slots=True)
class Retry:
    """Go back to the queue, and try again after a growing delay; the body's own retries are not touched.

    Args:
        delay: Seconds before the first new try.
        max_delay: Seconds that no delay exceeds.
        factor: By what the delay grows from one conflict to the next.
        jitter: True draws each delay between half of it and all of it, so that rivals don't meet again.
        limit: Most tries after a conflict; None: any number.
        max_wait: Seconds since the first conflict of this attempt; None: no end. When either is spent, the conflict is
            raised.
    """

    delay: float = 1.0
    max_delay: float = 30.0
    factor: float = 2.0
    jitter: bool = True
    limit: int | None = None
    max_wait: float | None = 3600.0

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in (("delay", 0), ("max_delay", 0), ("factor", 1)):
            _check_number(name, getattr(self, name), least)
        if self.max_wait is not None:
            _check_number("max_wait", self.max_wait, 0)
        if not isinstance(self.jitter, bool):
            raise ConfigurationError(f"Retry(jitter={self.jitter!r}) is neither True nor False")
        if self.limit is not None:
            check_count("Retry(limit)", self.limit, at_least=0)
        if self.max_delay < self.delay:
            raise ConfigurationError(
                f"Retry(delay={self.delay!r}, max_delay={self.max_delay!r}): the delay exceeds its maximum"
            )

    def next_delay(self, conflicts: int, chance: Callable[[], float]) -> float:
        """Give the seconds until the next try, after `conflicts` earlier ones (0: this is the first).

        `chance` draws from [0, 1).
        """
        try:
            full = min(self.max_delay, self.delay * self.factor**conflicts)
        except OverflowError:
            full = self.max_delay if self.delay else 0.0
        return full * (JITTER_FLOOR + (1 - JITTER_FLOOR) * chance()) if self.jitter else full

    def is_spent(self, conflicts: int, since_first: float) -> bool:
        """Say whether `conflicts` earlier tries, the first `since_first` seconds ago, use up the budget."""
        return (self.limit is not None and conflicts >= self.limit) or (
            self.max_wait is not None and since_first >= self.max_wait
        )


ConflictPolicy: TypeAlias = Raise | Skip | Call | Retry

_BY_NAME: dict[str, Callable[[], ConflictPolicy]] = {"raise": Raise, "skip": Skip, "retry": Retry}


def resolve_policy(value: object) -> ConflictPolicy:
    """Give the policy that `on_conflict=value` means: a name, a callable, a policy value, or a policy class.

    Raises: ConfigurationError.
    """
    if isinstance(value, (Raise, Skip, Call, Retry)):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]()
    if isinstance(value, type):
        if value in (Raise, Skip, Retry):
            policy: ConflictPolicy = value()
            return policy
        raise ConfigurationError(
            f"on_conflict={value.__module__}.{value.__qualname__} is a class{_foreign(value)}; {_CHOICES}"
        )
    if isinstance(value, BaseException):
        raise ConfigurationError(f"on_conflict={value!r} is an exception{_foreign(type(value))}; {_CHOICES}")
    if callable(value):
        return Call(value)
    raise ConfigurationError(f"on_conflict={value!r} is no policy{nearest(value, _BY_NAME)}; {_CHOICES}")


_CHOICES = (
    "use 'raise', 'skip', 'retry' (in a queue), a function that gets the call's arguments, "
    "or Raise(), Skip(result=...), Call(handler), Retry(delay=...) of concurrency_safe"
)


def _foreign(kind: type) -> str:
    return ", not the Retry of concurrency_safe" if kind.__name__ == "Retry" else ""


def _check_number(name: str, value: object, least: float) -> None:
    if not is_number(value, at_least=least):
        raise ConfigurationError(f"Retry({name}={value!r}) is not a number >= {least}")
