"""The few sessions of one process and one database: opened when needed, kept while they are used.

A session in the pool holds nothing. One that is lent belongs to its borrower alone; whoever can't prove that it is
clean ends it (`LockSession.discard`) instead of returning it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque

from .session import LockSession


class SessionPool:
    """Idle sessions, the most recently used first."""

    def __init__(self, size: int, max_idle: float) -> None:
        """Keep at most `size` idle sessions, each for at most `max_idle` seconds."""
        self._size = size
        self._max_idle = max_idle
        self._idle: deque[LockSession] = deque()
        self._pid = os.getpid()

    def checkout(self) -> LockSession | None:
        """Lend an idle session, or None: open one then."""
        self._forget_after_fork()
        self.prune()
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def checkin(self, session: LockSession) -> None:
        """Take back a session that holds nothing."""
        self._forget_after_fork()
        session.idle_since = time.monotonic()
        self._idle.append(session)
        self.prune()

    def prune(self) -> None:
        """End the sessions that are too many, or idle for too long."""
        oldest = time.monotonic() - self._max_idle
        # A snapshot: other threads lend and return meanwhile. The oldest stand first.
        for session in list(self._idle):
            if len(self._idle) <= self._size and session.idle_since >= oldest:
                return
            with contextlib.suppress(ValueError):  # it was lent a moment ago
                self._idle.remove(session)
                session.discard()

    def close(self) -> None:
        """End every idle session."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.popleft().discard()

    def _forget_after_fork(self) -> None:
        if self._pid != os.getpid():
            # The sockets are closed already (session._drop_in_child); what is left here are names.
            self._idle.clear()
            self._pid = os.getpid()
