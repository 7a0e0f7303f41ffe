"""Who owns which key inside this process.

Two sessions of one process exclude each other in the server, but one session is granted a lock that it holds already.
So a key is asked for by one owner of this process at a time, whatever session will hold it; the others queue here,
first come first served, and only one of them stands in the server's queue. Readers, and the holders of slots, follow
one another into the server as soon as the one before has been answered.

Every step survives an exception that a signal handler or `PyThreadState_SetAsyncExc` raises between two calls: what is
done is written down before it takes effect, and undoing it twice is the same as once.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from concurrency_safe import forks
from concurrency_safe.core.errors import ConfigurationError, LockCapacityError, LockReentrancyError
from concurrency_safe.core.steps import GateWait, Steps
from concurrency_safe.gates import LoopGate, ThreadGate, gate_for, is_owned

if TYPE_CHECKING:
    from concurrency_safe.core.keys import LockKey
    from concurrency_safe.core.sessions import Request

#: Seconds after which a waiter looks for itself whether it is its turn: the bell can be lost when its ringer is
#: interrupted between two calls.
LOOK_AGAIN = 0.25

#: Keys with slots whose number of slots is remembered past their last holder; more, and the oldest is forgotten.
SLOTS_KNOWN = 1000


class Claim:
    """One owner's hold on one key, or its place in the queue for it."""

    __slots__ = (
        "held",
        "key",
        "number",
        "owner",
        "session",
        "shared",
        "since",
        "slots",
        "stands",
        "token",
        "until",
        "work",
    )

    def __init__(self, key: LockKey, request: Request, owner: Owner, footing: Footing) -> None:
        """Claim `key` for `owner`; nothing is owned yet."""
        self.key = key
        self.shared = request.shared
        self.slots = request.slots
        self.owner = owner
        self.work = footing.work
        #: The acquisitions that stand on this claim: one, and those by which its owner entered again.
        self.stands = {footing}
        #: Says whether a transaction goes on whose lock this is, too; None: there is none.
        self.until: Callable[[], bool] | None = None
        #: Whether the store has granted it.
        self.held = False
        #: The session that holds the lock in the store, or is about to.
        self.session: Any = None
        #: What is locked in the store: the key's number, or that of its slot.
        self.number = key.number
        #: The fencing token that came with the grant.
        self.token: int | None = None
        #: The monotonic time of the grant; before it, of the acquisition's begin.
        self.since = footing.since

    @property
    def is_orphan(self) -> bool:
        """Whether it belongs to a task of an event loop that was closed: the task never goes on."""
        homes = [footing.home for footing in self.stands]
        return bool(homes) and all(home is not None and home.is_closed() for home in homes)

    @property
    def waits(self) -> bool:
        """Whether it waits in the server."""
        return not self.held and any(getattr(footing.session, "blocked", False) for footing in self.stands)

    def lose(self) -> None:
        """Tell every lock that stands on it that the session was cut; see `core.sessions.Hold`."""
        for footing in tuple(self.stands):
            lock = footing.lock() if footing.lock is not None else None
            if lock is not None:
                lock._tell_lost()  # noqa: SLF001 - a HeldLock's, for us


class Footing:
    """What one acquisition stands on, written down step by step, so that it can be undone at any point."""

    __slots__ = (
        "_gate",
        "backend",
        "claims",
        "home",
        "inside",
        "lock",
        "owner",
        "ownership",
        "pid",
        "session",
        "since",
        "token",
        "work",
    )

    def __init__(self, work: str | None, home: asyncio.AbstractEventLoop | None = None) -> None:
        """Stand on nothing. `work`: whose work it is for (a task's id), or None. `home`: the event loop, or None."""
        #: The monotonic time of its begin.
        self.since = time.monotonic()
        self.work = work
        self.home = home
        self.pid = forks.pid
        self._gate: ThreadGate | LoopGate | None = None
        #: The lock whose footing this is, weakly: it must not keep a forgotten one alive.
        self.lock: Callable[[], Any] | None = None
        #: What stands for the transaction inside which it was acquired, or None.
        self.inside: object | None = None
        #: Whose acquisition it is; None: not begun, or over.
        self.owner: Owner | None = None
        self.ownership: Ownership | None = None
        #: The lock store in which the claims are held; for a transaction's lock, the one of its database.
        self.backend: Any = None
        #: Every claim that this acquisition stands on; those that are not held yet are its own.
        self.claims: list[Claim] = []
        #: The session that it uses now.
        self.session: Any = None
        #: The fencing token that came with the grant.
        self.token: int | None = None

    @property
    def gate(self) -> ThreadGate | LoopGate:
        """Where it waits: made when it first has to."""
        if self._gate is None:
            self._gate = gate_for(self.home)
        return self._gate

    def is_amid_change(self) -> bool:
        """Say whether the running thread is in the middle of a change of what this stands on.

        Then the collector, or a signal, has come in between.
        """
        places = (self.ownership, getattr(self.backend, "pool", None))
        return any(place.is_amid_change() for place in places if place is not None)


class _Entry:
    """One key, as long as anybody of this process holds it or waits for it."""

    __slots__ = ("asker", "holders", "key", "queue", "shared", "slots")

    def __init__(self, claim: Claim) -> None:
        self.key = claim.key
        self.slots = claim.slots
        #: Who asks the server now; an exclusive holder stays here.
        self.asker: Claim | None = None
        #: Readers, and holders of slots.
        self.holders: dict[Owner, Claim] = {}
        #: Who waits for its turn to ask, the first first.
        self.queue: dict[Claim, Footing] = {}

    def admits(self, claim: Claim | Request) -> bool:
        """Say whether `claim` may ask the server: nobody asks, and no holder of this process is in its way."""
        if self.asker is not None:
            return False
        if claim.slots > 1:
            return len(self.holders) < claim.slots
        return not self.holders or (claim.shared and all(other.shared for other in self.holders.values()))

    def admits_soon(self, claim: Claim) -> bool:
        """Say whether all that is in the way of `claim` is another of its kind, to whom the server answers at once."""
        before = itertools.takewhile(lambda other: other is not claim, self.queue)
        return self.asker is not None and all(
            not (other.held or other.waits) and ((claim.shared and other.shared) or claim.slots > 1)
            for other in (self.asker, *before)
        )


class Ownership:
    """The claims of one lock space in this process."""

    def __init__(self, max_held: int) -> None:
        """Let at most `max_held` locks be held at once."""
        self._max_held = max_held
        self._reset()

    def _reset(self) -> None:
        self._pid = forks.pid
        self._entries: dict[int, _Entry] = {}
        #: What is held in the store, or asked for.
        self._held: set[Claim] = set()
        #: How many slots a key has, where there are several.
        self._slots: dict[int, int] = {}
        # Re-entrant: the collector may run a finalizer while this thread is in here.
        self._mutex = threading.RLock()

    def find(self, key: LockKey, owner: Owner) -> Claim | None:
        """Give the claim by which `owner` holds `key` already; one that is being released is no more.

        Raises: ConfigurationError: another key of this process has the same number.
        """
        if self._pid != forks.pid:
            self._reset()  # a forked child owns nothing
        entry = self._entries.get(key.number)
        if entry is None:
            return None
        claim = entry.asker
        if claim is None or claim.owner is not owner or not claim.held:
            claim = entry.holders.get(owner)
        if claim is None or not claim.stands:
            return None
        _refuse_collision(entry.key, key)
        return claim

    def enter_alone(self, footing: Footing, request: Request, owner: Owner) -> bool:
        """Do what `enter` does for one key that nobody of this process has to do with now; False: `enter` must."""
        key, *others = request.keys
        number = key.number
        if others or request.slots > 1 or number in self._entries or number in self._slots or self._pid != forks.pid:
            return False
        claim = Claim(key, request, owner, footing)
        entry = _Entry(claim)
        entry.asker = claim
        footing.ownership = self
        footing.claims.append(claim)
        with self._mutex:
            if len(self._held) < self._max_held and self._entries.setdefault(number, entry) is entry:
                self._held.add(claim)
                return True
        footing.claims.clear()
        return False

    def enter(self, footing: Footing, request: Request, owner: Owner) -> Steps[Claim | None]:
        """Make `owner` the one of this process who may ask for the keys, by the request's deadline.

        The keys that it holds already are counted once more; the claims on the others are not held yet.

        Returns: None, or the claim of the one who was in the way past the deadline.
        Raises: LockCapacityError, ConfigurationError, LockReentrancyError.
        """
        footing.ownership = self
        for key in request.keys:
            with self._mutex:  # or another thread may begin to release it in between
                held = self.find(key, owner)
                if held is not None:
                    _refuse_another_mode(held, request)
                    footing.claims.append(held)
                    held.stands.add(footing)
                    continue
            blocker = yield from self._queue(footing, Claim(key, request, owner, footing), request.deadline)
            if blocker is not None:
                return blocker
        return None

    def _queue(self, footing: Footing, mine: Claim, deadline: float | None) -> Steps[Claim | None]:
        footing.claims.append(mine)
        number = mine.key.number
        with self._mutex:
            entry = self._entries.get(number)
            self._refuse_other_slots(mine, entry)
            if entry is None:
                entry = _Entry(mine)
                entry.asker = mine
                self._entries[number] = entry
                self._count(mine)
                return None
            _refuse_collision(entry.key, mine.key)
            entry.queue[mine] = footing
            self._advance(entry)
        while entry.asker is not mine:
            now = time.monotonic()
            late = deadline is not None and now >= deadline
            if late:
                with self._mutex:
                    if not entry.admits_soon(mine):
                        return entry.asker or next(iter(entry.holders.values()), mine)
            again = now + LOOK_AGAIN
            yield GateWait(footing.gate, again if deadline is None or late else min(again, deadline))
        with self._mutex:
            self._count(mine)
        return None

    def _count(self, claim: Claim) -> None:
        """Count a lock that is about to be asked for.

        Raises: LockCapacityError.
        """
        if len(self._held) >= self._max_held:
            self._held.difference_update([one for one in self._held if not one.held and one.is_orphan])
        if len(self._held) >= self._max_held:
            raise LockCapacityError(
                f"this process holds {len(self._held)} locks, which is its cap (MAX_HELD={self._max_held}); "
                "hold fewer at a time, or raise MAX_HELD and PostgreSQL's max_locks_per_transaction",
                claim.key.text,
            )
        self._held.add(claim)

    def confirm(self, footing: Footing) -> None:
        """Write down that the store has granted what `footing` asked for; readers and slots let the next one ask."""
        for claim in footing.claims:
            if claim.held:  # its owner entered it again
                continue
            claim.held = True
            claim.since = time.monotonic()
            claim.token = footing.token
            if claim.shared or claim.slots > 1:
                with self._mutex:
                    entry = self._entries[claim.key.number]
                    entry.holders[claim.owner] = claim
                    entry.asker = None
                    self._advance(entry)

    def leaving(self, footing: Footing) -> tuple[list[Claim], list[Claim]]:
        """Take `footing` off its claims; from then on nobody can enter again those that it was the last on.

        Returns: those, and the ones among them that the store has granted, and must free.
        """
        last, held = [], []
        with self._mutex:
            for claim in footing.claims:
                claim.stands.discard(footing)
                if not claim.stands:
                    last.append(claim)
                    if claim.held:
                        held.append(claim)
        return last, held

    def is_amid_change(self) -> bool:
        """Say whether the running thread is in the middle of a change."""
        return is_owned(self._mutex)

    def leave(self, claim: Claim) -> None:
        """Give up the key, or the place in the queue; the first in the queue is the next to ask.

        Twice is the same as once, since an interrupt may come between any two lines.
        """
        with self._mutex:
            self._held.discard(claim)
            number = claim.key.number
            entry = self._entries.get(number)
            if entry is None:
                return
            if entry.asker is claim:
                entry.asker = None
            if entry.queue or entry.holders:
                entry.queue.pop(claim, None)
                if entry.holders.get(claim.owner) is claim:
                    del entry.holders[claim.owner]
                self._advance(entry)
            if entry.asker is None and not entry.holders and not entry.queue:
                del self._entries[number]

    def waiting(self, key: LockKey) -> int:
        """Count the owners of this process that queue for `key` here."""
        entry = self._entries.get(key.number)
        return len(entry.queue) if entry is not None else 0

    def ahead(self, key: LockKey, request: Request) -> int | None:
        """Count the owners of this process that wait for `key`, here or in the server; None: nobody is in the way."""
        with self._mutex:
            entry = self._entries.get(key.number)
            if entry is None or entry.admits(request):
                return None
            return len(entry.queue) + (entry.asker is not None and entry.asker.waits)

    @staticmethod
    def _advance(entry: _Entry) -> None:
        if entry.asker is not None and not entry.asker.held and entry.asker.is_orphan:
            entry.asker = None
        for heir, footing in tuple(entry.queue.items()):
            if heir.is_orphan:
                del entry.queue[heir]
                continue
            if entry.admits(heir):
                entry.asker = heir
                del entry.queue[heir]
                footing.gate.open()
            return

    def refuse_slots(self, keys: tuple[LockKey, ...]) -> None:
        """Refuse to take any of `keys` without slots (in a transaction) where this process uses it with them.

        Raises: ConfigurationError.
        """
        for key in keys:
            _refuse_slots(key, self._slots.get(key.number, 1), 1)

    def _refuse_other_slots(self, claim: Claim, entry: _Entry | None) -> None:
        known = self._slots.get(claim.key.number, entry.slots if entry is not None else claim.slots)
        _refuse_slots(claim.key, known, claim.slots)
        if claim.slots > 1:
            self._slots[claim.key.number] = claim.slots
            if len(self._slots) > SLOTS_KNOWN:
                del self._slots[next(iter(self._slots))]


class Owner:
    """Who holds locks: a flow of control, which may enter again what it holds.

    Not the thread alone: a pool's thread runs one job after the other, and asgiref's `sync_to_async` runs the
    synchronous parts of many tasks in one thread. Not the context alone: a child task inherits a copy of it. So a flow
    is known by the context in which it acquired (`locks` keeps its owners there), and by who runs.
    """

    __slots__ = ("_part", "_who")

    def __init__(self, who: object, part: object) -> None:
        """Take what `running` said. Not by their numbers, which are used again after their end.

        Weakly: a claim is known to the whole process, and a task that is forgotten with its lock must be collected.
        """
        self._who = _weakly(who)
        self._part = None if part is None else _weakly(part)

    def is_running(self, who: object, part: object) -> bool:
        """Say whether it is what `running` says now."""
        if self._who() is not who:
            return False
        return part is None if self._part is None else part is not None and self._part() is part

    def __str__(self) -> str:
        """Say who it is, in a few words."""
        who = self._who()
        if isinstance(who, asyncio.Task):
            return f"task {who.get_name()!r}"
        return f"thread {getattr(who, 'name', '?')!r}"


def _weakly(thing: object) -> Callable[[], object]:
    try:
        return weakref.ref(thing)
    except TypeError:  # a frame
        return lambda: thing


def running() -> tuple[object, object]:
    """Say who is running: the asyncio task, or else the thread (the greenlet, when gevent has patched `threading`).

    With it, inside asgiref's `sync_to_async`: which call of it that is, since one thread runs those of many tasks.
    """
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 - documented as public for this purpose, and never raises
        task = asyncio.current_task()
        if task is not None:
            return task, None
    asgiref: Any = sys.modules.get("asgiref.sync")
    if asgiref is not None and hasattr(asgiref.SyncToAsync.threadlocal, "main_event_loop"):
        return threading.current_thread(), _part(asgiref.SyncToAsync.thread_handler.__code__)
    return threading.current_thread(), None


def _part(entrance: CodeType) -> object:
    """Give what stands for the innermost call of asgiref's `thread_handler`, or None.

    asgiref says only that this thread has made such calls. Each call has a callable of its own to run (its `func`, in
    every release since 3.6), which also tells it from an earlier one whose frame was at the same address.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - as `inspect.currentframe`, without importing it
    while frame is not None:
        if frame.f_code is entrance:
            return frame.f_locals.get("func", frame)
        frame = frame.f_back
    return None


def _refuse_slots(key: LockKey, known: int, wanted: int) -> None:
    if known != wanted:
        raise ConfigurationError(
            f"lock {key.text!r}: slots={wanted}, but this process uses it with slots={known}; "
            "a key has one number of slots everywhere",
            key.text,
        )


def _refuse_another_mode(held: Claim, request: Request) -> None:
    _refuse_slots(held.key, held.slots, request.slots)
    if held.shared != request.shared:
        had, wanted = ("shared", "exclusive") if held.shared else ("exclusive", "shared")
        raise LockReentrancyError(
            f"lock {held.key.text!r} is held {had} here and can't be entered again as {wanted}: two that did so would "
            f"wait for each other; take it {wanted} from the start, or release it first",
            held.key.text,
        )


def _refuse_collision(held: LockKey, wanted: LockKey) -> None:
    if held.text != wanted.text:
        raise ConfigurationError(
            f"the keys {held.text!r} and {wanted.text!r} have the same number {held.number}: "
            "a rare accident of hashing; rename one of them",
            wanted.text,
        )
