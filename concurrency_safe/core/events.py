"""What happened to a lock, as listeners hear it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

EventKind: TypeAlias = Literal["acquired", "conflicted", "released", "lost"]


@dataclass(frozen=True, slots=True)
class LockEvent:
    """One event. `waited` and `held` are seconds; `timeout` is what the caller asked for (None: for ever)."""

    kind: EventKind
    keys: tuple[str, ...]
    waited: float | None = None
    held: float | None = None
    timeout: float | None = None
    holder: str | None = None


Hook: TypeAlias = Callable[[LockEvent], None]
