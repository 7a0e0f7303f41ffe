"""A lock store in this process alone: for tests, and for code that may run without a database.

The rules of who owns a key inside a process are those of every store (`ownership`); nothing else is needed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from concurrency_safe.core.sessions import Borrower, Hold, Request
from concurrency_safe.core.steps import Steps


class _Grant(NamedTuple):
    token: int


class MemoryBackend:
    """`lock("stock:ABC", backend=MemoryBackend())`: the same backend excludes, another one doesn't."""

    def __init__(self) -> None:
        """Make an empty store."""
        self._tokens = itertools.count(1)
        self._held: set[Hold] = set()

    def acquire(self, borrower: Borrower, request: Request, holds: Sequence[Hold]) -> Steps[_Grant | None]:  # noqa: ARG002
        """Grant it: whoever asks here is the only one of this process who may."""
        yield from ()
        self._held.update(holds)
        return _Grant(next(self._tokens))

    def conflict(self, borrower: Borrower, request: Request) -> Steps[str | None]:  # noqa: ARG002 - the protocol's
        """Say nothing: a conflict is seen before the store is asked."""
        yield from ()
        return None

    def release(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:  # noqa: ARG002 - the protocol's
        """Release `holds`; False: one of them was lost."""
        yield from ()
        released = self._held.issuperset(holds)
        self._held.difference_update(holds)
        return released

    def undo(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[None]:  # noqa: ARG002 - the protocol's
        """Forget `holds`."""
        yield from ()
        self._held.difference_update(holds)

    def prove(self, borrower: Borrower, holds: Sequence[Hold]) -> Steps[bool]:  # noqa: ARG002 - the protocol's
        """Say whether all of `holds` are held."""
        yield from ()
        return self._held.issuperset(holds)

    def is_lost(self, hold: Hold) -> bool:
        """Say whether `lose` took it away."""
        return hold not in self._held

    def lose(self) -> None:
        """Lose every lock that is held, as when the store restarts."""
        lost, self._held = self._held, set()
        for hold in lost:
            hold.lose()

    def close(self) -> None:
        """Do nothing: there are no sessions."""
