"""What the layers above a backend may do with the session that holds a lock."""

from __future__ import annotations

from typing import Any, Protocol


class LockSession(Protocol):
    """A connection to the lock store that holds one lock, or waits for it."""

    def is_dead(self) -> bool:
        """Say, without a query, whether the store has closed this idle session."""
        ...

    def discard(self) -> None:
        """End the session, and with it the lock, whatever it is doing."""
        ...


class Slot(Protocol):
    """Where a session is written down before it can hold anything: whoever owns the slot ends the session."""

    #: The backend's own kind of session; a `LockSession` for everybody else.
    session: Any
    work: str | None
