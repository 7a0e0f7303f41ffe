"""One watcher per process sees that a session was cut, without a query, while the bodies run.

Where the system can tell the end of a stream from data (epoll's EPOLLRDHUP), a thread sleeps until a server hangs up;
elsewhere (macOS, gevent) it looks at the idle sessions twenty times a second. A network that just falls silent says
nothing at all: holders' sessions are asked for a sign of life when they have had no traffic for `HEARTBEAT` seconds.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from concurrency_safe import threads
from concurrency_safe.core.steps import Steps
from concurrency_safe.gates import ThreadGate

from .protocol import ServerGoneError, ServerRefusedError
from .session import HEARTBEAT, LockSession
from .waiting import drive, has_hung_up

if TYPE_CHECKING:
    from .pool import SessionPool

logger = logging.getLogger("concurrency_safe")

#: Seconds between two looks: for signs of life with epoll, at the sockets themselves without it.
LOOK_WITH_EPOLL, LOOK = 1.0, 0.05


class _Watcher:
    """Uses sessions as a borrower does, when nobody else does."""

    work: str | None = None
    home: Any = None

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.session: Any = None
        self.gate = ThreadGate()
        self.sessions: dict[int, tuple[weakref.ref[LockSession], SessionPool]] = {}
        self.epoll = select.epoll() if hasattr(select, "epoll") else None
        self.is_running = False
        self._only = threading.Lock()

    def add(self, session: LockSession, pool: SessionPool) -> None:
        fd = session.pgconn.socket
        self.sessions[fd] = (weakref.ref(session), pool)
        if self.epoll is not None:
            self.epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def start(self) -> None:
        """Start the thread; without it there is less to hear, and no lock less."""
        try:
            threads.start(self.run, "concurrency_safe watcher")
        except RuntimeError:
            logger.exception("the watcher of lock sessions does not start; a lost lock is told at its release only")

    def run(self) -> None:
        if not self._only.acquire(blocking=False):
            return
        self.is_running = True
        while True:
            try:
                self.look()
            except BaseException:  # SystemExit, too: a callback on a loss may raise it
                logger.exception("the watcher of lock sessions failed, and goes on")

    def look(self) -> None:
        if self.epoll is None:
            _pause.wait(LOOK)
            suspects = list(self.sessions)
        else:
            suspects = [fd for fd, _ in self.epoll.poll(LOOK_WITH_EPOLL)]
        for fd in suspects:
            self.inspect(fd)
        due = time.monotonic() - HEARTBEAT
        for fd, entry in list(self.sessions.items()):
            session, pool = entry[0](), entry[1]
            if session is None or session.dead:
                if self.sessions.get(fd) is entry:  # pragma: no branch - the number may be another session's by now
                    del self.sessions[fd]
                continue
            self.answer(session, pool)
            if not session.held:
                pool.prune()
            elif session.used_at < due:
                self.ask(session, pool)

    def inspect(self, fd: int) -> None:
        reference, pool = self.sessions.get(fd, (None, None))
        session = reference() if reference is not None else None
        if session is None or pool is None:
            return
        with pool.mutex:
            # The event may be an earlier session's, whose file had the same number: so look again. What a session in
            # use receives is for its user to read.
            lost = not session.dead and (session.is_dead() if session.user is None else has_hung_up(fd))
        if lost:
            pool.forget(session)

    def answer(self, session: LockSession, pool: SessionPool) -> None:
        """Tell those who asked (`concurrency-safe locks`) what `session` holds, or has held just now."""
        with pool.mutex:
            if session.user is not None:
                return
            lost = session.is_dead()  # which reads what came
            channels = [] if lost else session.asked()
        if lost:  # the end was just read: epoll has nothing left to tell
            pool.forget(session)
        for channel in channels:
            self.use(session, pool, session.tell(channel))

    def ask(self, session: LockSession, pool: SessionPool) -> None:
        """Ask for a sign of life."""
        self.use(session, pool, session.beat())

    def use(self, session: LockSession, pool: SessionPool, steps: Steps[None]) -> None:
        """Run `steps` on `session`, unless somebody uses it."""
        with pool.mutex:
            if session.user is not None or session.dead:
                return
            self.session = session
            session.user = self
        try:
            drive(steps)
            drive(pool.free(self))
        except (ServerGoneError, ServerRefusedError):
            session.dead = True
            session.user = None
            self.session = None
            pool.forget(session)


_pause = threading.Event()  # never set
_watcher: _Watcher | None = None


def watch(session: LockSession, pool: SessionPool) -> None:
    """Let the watcher of this process look after `session`; it is started with the first one."""
    global _watcher  # noqa: PLW0603 - one a process
    watcher = _watcher
    if watcher is None or watcher.pid != os.getpid():
        watcher = _watcher = _Watcher()
    watcher.add(session, pool)
    if not watcher.is_running:
        watcher.start()
