"""What the layers above a backend know of it: the request, the borrower of a session, and the session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .keys import LockKey
from .steps import Gate, Steps


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the settings say to a lock store.

    `pool_size`: most sessions kept. `pool_idle`: seconds that an idle one is kept. `max_block`: seconds that one wait
    blocks in the server. `fencing`: whether locks have tokens. `pooled`: whether a pooler in transaction mode stands
    before the store.
    """

    pool_size: int = 4
    pool_idle: float = 60.0
    max_block: float = 10.0
    fencing: bool = False
    pooled: bool = False


class Request(NamedTuple):
    """What one acquisition asks of the store.

    `keys`: sorted by number, each once. `shared`: with other readers. `slots`: most holders; above 1 there is one key.
    `deadline`: monotonic time, None: for ever. `timeout`: what the caller asked for, for messages; 0: one try is all.
    `max_waiters`: most that may wait for the key already; None: any number.
    """

    keys: tuple[LockKey, ...]
    shared: bool = False
    slots: int = 1
    deadline: float | None = None
    timeout: float | None = None
    max_waiters: int | None = None

    @property
    def text(self) -> str:
        """The keys, for messages."""
        return ", ".join(key.text for key in self.keys)


class Hold(Protocol):
    """One key that a session holds, or is about to: whoever owns it is told of its loss."""

    key: LockKey
    shared: bool
    #: The number that is locked for it in the store: the key's own, or that of its slot.
    number: int
    session: Any
    #: The monotonic time of the grant; before it, of the acquisition's begin.
    since: float

    def lose(self) -> None:
        """Hear that the session was cut."""


class Borrower(Protocol):
    """Who uses a session now. What it uses is written down here before anything can be held by it."""

    #: The session that it uses now; the backend's own kind.
    session: Any
    #: Whose work it does (a task's id), or None.
    work: str | None
    #: The event loop that drives it, or None: a thread.
    home: Any

    @property
    def gate(self) -> Gate:
        """Where it waits for its turn."""
        ...


class Grant(Protocol):
    """What was granted."""

    @property
    def token(self) -> int | None:
        """The fencing token; None: not enabled."""
        ...


class Backend(Protocol):
    """A lock store, for one process: `postgres.backend` and `memory`."""

    def acquire(self, borrower: Borrower, request: Request, holds: Sequence[Hold]) -> Steps[Grant | None]:
        """Take all keys of `request` or none: `holds` are held then. None: others kept one; `conflict` comes next.

        After anything but a return the caller lets `undo` run.
        """
        ...

    def conflict(self, borrower: Borrower, request: Request) -> Steps[str | None]:
        """After a refusal: end the turn of `borrower`, and say in a few words who holds the keys.

        None: it can't be read, or nobody does any more.
        """
        ...

    def release(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:
        """Release `holds`; False: one of them wasn't held any more."""
        ...

    def undo(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[None]:
        """End what an interrupted acquisition or release left: afterwards nothing of `holds` is held."""
        ...

    def prove(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:
        """Make sure, by asking the store, that all of `holds` are held at this moment; False: one isn't.

        After anything but a return the caller lets `undo` run.
        """
        ...

    def is_lost(self, hold: Hold) -> bool:
        """Say, without a query, whether the session of `hold` was cut."""
        ...

    def close(self) -> None:
        """End the idle sessions."""
        ...
