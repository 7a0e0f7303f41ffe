"""`lock()`: one acquisition (`Lock`), and the proof of holding it (`HeldLock`).

Here is decided in which scope a lock is held, and that every way out of an acquisition but success leaves nothing
behind: what an acquisition stands on is written into its `HeldLock` step by step, and dropping that undoes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from concurrency_safe import forks, instrumentation, threads
from concurrency_safe.conf import Settings, get_settings
from concurrency_safe.core.errors import (
    ConcurrencySafeError,
    ConfigurationError,
    LockAcquireTimeout,
    LockInTransaction,
    LockLost,
    LockNotHeld,
    LockReentrancyError,
)
from concurrency_safe.core.events import EventKind, LockEvent
from concurrency_safe.core.keys import LockKey, lock_key
from concurrency_safe.core.options import UNSET, LockOptions, Unset, lock_options
from concurrency_safe.core.sessions import Request
from concurrency_safe.core.steps import Steps
from concurrency_safe.ownership import Claim, Footing, Owner, running
from concurrency_safe.postgres.alias import other_in_transaction, require_postgresql, transaction_of
from concurrency_safe.postgres.backend import refuse_long_queue
from concurrency_safe.postgres.inspect import describe_work
from concurrency_safe.postgres.loop import adrive, atake_turns, finish, running_loop
from concurrency_safe.postgres.transaction import TransactionLock
from concurrency_safe.postgres.waiting import drive, take_turns
from concurrency_safe.spaces import (
    LockSpace,
    django_connection,
    space_at_hand,
    space_for,
    space_of,
)

if TYPE_CHECKING:
    from types import TracebackType

    from django.db.backends.base.base import BaseDatabaseWrapper

Key = str | tuple[object, ...]

_Stack: TypeAlias = "tuple[_Net, _Stack] | None"

#: Whose work the running thread or task does: an adapter sets a task's id, so that a conflict can name the holder.
current_work: ContextVar[str | None] = ContextVar("concurrency_safe_work", default=None)

#: The locks that the running thread or task holds: the innermost, and the stack below it; None: it holds none. Weak:
#: it must not keep a forgotten one alive.
_stack: ContextVar[_Stack] = ContextVar("concurrency_safe", default=None)

#: Locks acquired without a block: they are held until they are released, whether or not anybody keeps the result.
_kept: set[HeldLock] = set()


def lock(  # noqa: PLR0913 - one keyword an option
    *keys: Key,
    timeout: float | Unset | None = UNSET,
    shared: bool = False,
    slots: int = 1,
    scope: str = "auto",
    using: str | None = None,
    backend: object | None = None,
    max_waiters: int | None = None,
) -> Lock:
    """Name a lock; `with` acquires it, and releases it when the block ends.

        with lock("stock:ABC", timeout=2.0) as held: ...

    Args:
        keys: Texts, or tuples of parts. The same key is the same lock in every process on the database. Several: all
            or none, and without a deadlock in whatever order they are named.
        timeout: Seconds to wait for the lock; 0 tries once; None waits for ever. Default: the setting TIMEOUT, 3.0.
            Opening a connection, for the first lock of a process, has a limit of its own (`connect_timeout` of the
            DSN, 10 seconds for each host).
        scope: "session" holds it on a private connection until the block ends. "transaction" holds it on Django's
            connection until its outermost commit or rollback. "auto": "transaction" inside `atomic()`, else
            "session". "detached": a private connection also inside a transaction.
        using: The Django alias; default: the setting USING.
        shared: True: together with other readers; a writer that waits goes before readers that come later.
        slots: Most holders at once, in all processes, up to 1000; the same number everywhere for one key.
        backend: A lock store of one's own (`concurrency_safe.memory.MemoryBackend` in tests); None: PostgreSQL.
        max_waiters: Don't wait where so many wait already: raise at once; None: any number.

    Raises:
        ConfigurationError, KeyTemplateError: At once, for a bad option or key.
        LockAcquireTimeout, LockUnavailable, LockInTransaction, LockReentrancyError, LockCapacityError: By `with`.
        LockLost: By the end of `with`, and by a `with` that enters again what was lost (see the setting ON_LOST).
    """
    try:
        options = lock_options(timeout, shared, slots, scope, using, max_waiters)
    except TypeError:  # unhashable, so it is no good value either: the checks say which
        options = LockOptions(
            timeout=timeout, shared=shared, slots=slots, scope=scope, using=using, max_waiters=max_waiters
        )
    if backend is not None:  # not remembered
        options = replace(options, backend=backend)
    # A bad key is an error of this line, not of the `with`.
    return Lock(keys, options, tuple(map(lock_key, keys)))


class Lock:
    """One acquisition: enter it once, by `with` or `async with`."""

    __slots__ = ("_held", "_keys", "_known", "_options", "_unused", "failure")

    def __init__(self, keys: tuple[Key, ...], options: LockOptions, known: tuple[LockKey, ...] | None = None) -> None:
        """Check what can be checked without the store; nothing is acquired. `known`: the keys without a namespace."""
        if len(keys) != 1:
            if not keys:
                raise ConfigurationError(
                    'lock() needs a key: lock("stock:ABC"), or a tuple of parts, lock(("stock", sku))'
                )
            if options.slots > 1:
                raise ConfigurationError(f"slots={options.slots} with {len(keys)} keys: slots go with one key")
        self._keys = keys
        self._known = known
        self._options = options
        self._held: HeldLock | None = None
        self._unused = True
        #: The error that ended the acquisition, so that a caller can tell it from one of the body's.
        self.failure: ConcurrencySafeError | None = None

    def __repr__(self) -> str:
        """Show the keys."""
        return f"<Lock {', '.join(map(repr, self._keys))}>"

    def __enter__(self) -> HeldLock:
        """Acquire the lock."""
        return self._enter(keep=False)

    def _enter(self, *, keep: bool) -> HeldLock:
        take_turns()
        held = self._begin(None)
        try:
            if held._settings.enabled:
                drive(held._acquire(self._options))
            held._enter_context(keep=keep)
        except BaseException as error:
            held._abandon()
            self._note(error)
            raise
        return held

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock; in transaction scope it stays until the commit or rollback."""
        held = self._held
        if held is not None and held._is_entered:
            if error is None:  # which nothing here may hide
                held._refuse_before_commit()
            held._release(error)

    def acquire(self) -> HeldLock:
        """Acquire the lock without a block; it is held until `HeldLock.release()`, or the end of the process."""
        return self._enter(keep=True)

    async def __aenter__(self) -> HeldLock:
        """Acquire the lock; the event loop goes on meanwhile."""
        return await self._aenter(keep=False)

    async def _aenter(self, *, keep: bool) -> HeldLock:
        await atake_turns()  # before there is anything to undo
        held = self._begin(asyncio.get_running_loop())
        try:
            if held._settings.enabled:
                await adrive(held._acquire(self._options))
            held._enter_context(keep=keep)
        except BaseException as error:
            await held._aabandon()
            self._note(error)
            raise
        return held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        if self._held is not None and self._held._is_entered:
            await self._held._arelease(error)

    async def aacquire(self) -> HeldLock:
        """Acquire the lock without a block; it is held until `HeldLock.arelease()`, or the end of the process."""
        return await self._aenter(keep=True)

    def _begin(self, home: asyncio.AbstractEventLoop | None) -> HeldLock:
        try:
            del self._unused  # by one of two threads
        except AttributeError:
            texts = ", ".join(map(repr, self._keys))
            raise LockReentrancyError(
                f"lock {texts} was entered already; a Lock is one acquisition: call lock(...) again",
                str(self._keys[0]),
            ) from None
        settings = get_settings()
        keys = self._known
        if keys is None or settings.namespace:
            keys = tuple([lock_key(key, settings.namespace) for key in self._keys])
        if len(keys) > 1:
            keys = tuple({key.number: key for key in keys}.values())
        held = self._held = HeldLock(keys, settings, home)
        return held

    def _note(self, error: BaseException) -> None:
        if isinstance(error, ConcurrencySafeError):
            self.failure = error


class HeldLock:
    """The proof of holding a lock, and the way to release it."""

    __slots__ = (
        "__weakref__",
        "_active",
        "_callbacks",
        "_footing",
        "_keys",
        "_lost",
        "_net",
        "_settings",
        "_transaction",
        "waited",
    )

    def __init__(
        self, keys: tuple[LockKey, ...], settings: Settings, home: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """Prepare an acquisition of `keys`, for a task of the event loop `home` or a thread: it stands on nothing."""
        self._keys = keys
        self._settings = settings
        self._transaction: TransactionLock | None = None
        self._callbacks: deque[Callable[[HeldLock], object]] | None = None
        self._lost = False
        self._active = False
        #: Seconds that the acquisition took.
        self.waited = 0.0
        footing = self._footing = Footing(current_work.get(), home)
        net = footing.lock = _Net(self, _catch)
        net.footing = footing
        _nets.add(net)
        self._net: _Net | None = net

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, as text, in the order in which they were named."""
        return tuple(key.text for key in self._keys)

    @property
    def token(self) -> int | None:
        """The fencing token: it rises with every acquisition of a key; None: FENCING is not enabled.

        Also while the lock is held: where its own flow acquires one of its keys together with others, it has the newer
        token, too.
        """
        return self._footing.token

    @property
    def is_active(self) -> bool:
        """Whether it was acquired, by this process, and neither released nor ended with its transaction yet."""
        return self._is_entered and not (self._transaction is not None and self._transaction.is_over())

    @property
    def _is_entered(self) -> bool:
        return self._active and self._footing.pid == forks.pid

    @property
    def _text(self) -> str:
        return ", ".join(self.keys)

    def __repr__(self) -> str:
        """Show the keys and the state."""
        return f"<HeldLock {self._text!r} {'held' if self.is_active else 'not held'}>"

    @property
    def is_lost(self) -> bool:
        """Whether the lock went away while it was held: its session was cut.

        Costs no query, except in a transaction without autocommit, or with a savepoint that was rolled back.
        """
        if not self._lost and self.is_active and self._is_cut():
            self._tell_lost()
        return self._lost

    def check(self) -> None:
        """Make sure that the lock is still held.

        Raises: LockLost: it went away. LockNotHeld: it was released.
        """
        if self.is_lost:
            raise self._loss()
        if not self.is_active:
            raise LockNotHeld(f"lock {self._text!r} is not held any more", self._text)

    def on_lost(self, callback: Callable[[HeldLock], object]) -> None:
        """Call `callback(held)` once, as soon as the loss of the lock is noticed; at once when it was noticed before.

        From the library's watcher, which is a thread of its own; for a lock that an asyncio task holds, in its event
        loop: `held.on_lost(lambda held: task.cancel())`.
        """
        if self._callbacks is None:
            self._callbacks = deque()
        self._callbacks.append(callback)
        if self._lost:
            self._call_at_home()

    def sockets(self) -> frozenset[int]:
        """Give the file descriptors of the connections that hold the lock.

        The lock lives while anybody has them open: a child process that inherits them keeps it past our sudden death.
        Empty in transaction scope, and for a lock store of one's own.
        """
        sessions = (claim.session for claim in self._footing.claims if claim.held)
        return frozenset(session.pgconn.socket for session in sessions if hasattr(session, "pgconn"))

    def release(self) -> None:
        """Release the lock now; in transaction scope it stays until the commit or rollback.

        Raises: LockNotHeld: it was released before. LockLost: it had gone away.
        """
        self._require_entered(is_async=False)
        self._release(None)

    async def arelease(self) -> None:
        """Release the lock now, while the event loop goes on. See `release`."""
        self._require_entered(is_async=True)
        await self._arelease(None)

    def _require_entered(self, *, is_async: bool) -> None:
        if not self._is_entered:
            raise LockNotHeld(f"lock {self._text!r} was released already, or by another process", self._text)
        self._refuse_before_commit()
        if is_async != (self._footing.home is not None):
            theirs, ours = ("held.release()", "aacquire") if is_async else ("await held.arelease()", "acquire")
            raise ConfigurationError(f"lock {self._text!r} was not acquired by {ours}(): release it by `{theirs}`")

    def _refuse_before_commit(self) -> None:
        """Keep what a transaction that goes on has entered again: its lock lasts until the commit.

        Raises: LockInTransaction.
        """
        for claim in self._footing.claims:
            if claim.until is None or self._footing.inside is not None or not claim.until():
                continue
            if all(other.inside is not None for other in claim.stands if other is not self._footing):
                raise LockInTransaction(
                    f"lock {claim.key.text!r} was entered again inside a transaction, which goes on; release it after "
                    "the commit or rollback",
                    claim.key.text,
                )

    # The way in. `Lock` calls `_abandon` after anything but success.

    def _acquire(self, options: LockOptions) -> Steps[None]:
        settings = self._settings
        timeout = options.timeout
        if timeout is UNSET:
            timeout = settings.timeout
        keys = self._keys
        request = Request(
            keys if len(keys) == 1 else tuple(sorted(keys, key=_by_number)),
            options.shared,
            options.slots,
            None if timeout is None else self._footing.since + timeout,
            timeout,
            options.max_waiters,
        )
        if options.backend is not None:
            yield from self._acquire_in_session(space_of(options.backend, settings), request)
        else:
            connection = django_connection(options.using, settings)
            if connection is None:
                if options.scope == "transaction":
                    raise ConfigurationError(
                        f"lock {self._text!r}: scope='transaction' needs a Django connection, and Django is not "
                        "configured"
                    )
                inside = None
            else:
                inside = self._footing.inside = transaction_of(connection)
            if connection is not None and _is_transactional(options, connection, keys, inside):
                yield from self._acquire_in_transaction(connection, request)
            else:
                space = space_at_hand(connection, settings) or (yield from space_for(connection, settings))
                yield from self._acquire_in_session(space, request)
        if self._footing.token is not None:
            yield from self._share_token(self._footing.token)
        self.waited = time.monotonic() - self._footing.since
        if instrumentation.hooks:
            self._emit("acquired", waited=self.waited)

    def _share_token(self, token: int) -> Steps[None]:
        """Give the newest token to all locks of this flow that it can meet in a row: those with a key in common.

        They hold their keys since before, so nobody else's token is between the two. A claim proves that by a
        statement, unless its session is that of the token; a lock of which one doesn't is left out. A lock in
        transaction scope shares the tokens of its own transaction alone.
        """
        mine = self._footing
        footings = [one._footing for one in self._sharing_transaction()]
        sessions = {claim.session for claim in mine.claims if claim.token == token and claim.session is not None}
        for footing in footings:
            claims = [claim for claim in tuple(footing.claims) if claim.held]
            older = [claim for claim in claims if claim.token != token and claim.session not in sessions]
            if older and not (yield from mine.backend.prove(mine, older)):
                if footing is not mine:
                    continue
                if self._settings.on_lost == "raise":
                    raise self._loss()
                mine.token = min((claim.token for claim in older if claim.token is not None), default=None)
                return
            footing.token = token
            sessions.update(claim.session for claim in older if claim.session is not None)
            for claim in claims:
                claim.token = token
                footings += [other for other in tuple(claim.stands) if other not in footings]

    def _sharing_transaction(self) -> list[HeldLock]:
        """Give this lock, and those held by the same transaction that have a key in common with it, or so in a row."""
        sharing, others = [self], set[HeldLock]()
        if self._transaction is not None:
            others = {
                held
                for held in _stacked_locks()
                if held._active and held._transaction is not None and held._transaction.lives_with(self._transaction)
            }
        for one in sharing:
            found = [other for other in others if not set(other._keys).isdisjoint(one._keys)]
            sharing += found
            others.difference_update(found)
        return sharing

    def _acquire_in_session(self, space: LockSpace, request: Request) -> Steps[None]:
        footing = self._footing
        footing.backend = space.backend
        owner = footing.owner = _current_owner()
        if request.max_waiters is not None:
            self._refuse_long_queue(space, request, owner)
        claims = space.claims
        if not claims.enter_alone(footing, request, owner):
            blocker = yield from claims.enter(footing, request, owner)
            if blocker is not None:
                raise self._conflict(request, _describe(blocker))
        fresh = [claim for claim in footing.claims if not claim.held]
        if len(fresh) < len(footing.claims):
            yield from self._enter_again(space, request, fresh)
        else:
            yield from self._ask(space, request, fresh)

    def _enter_again(self, space: LockSpace, request: Request, fresh: list[Claim]) -> Steps[None]:
        """Enter what the owner holds already, and acquire the `fresh` ones."""
        footing = self._footing
        self._refuse_lost()
        if fresh:
            yield from self._ask(space, request._replace(keys=tuple(claim.key for claim in fresh)), fresh)
            self._refuse_lost()  # that may have noticed it
        else:
            footing.token = max((claim.token for claim in footing.claims if claim.token is not None), default=None)

    def _ask(self, space: LockSpace, request: Request, fresh: list[Claim]) -> Steps[None]:
        footing = self._footing
        grant = yield from space.backend.acquire(footing, request, fresh)
        if grant is None:
            raise self._conflict(request, (yield from space.backend.conflict(footing, request)))
        footing.token = grant.token
        space.claims.confirm(footing)

    def _refuse_lost(self) -> None:
        """Refuse to enter again what was lost: the body would run unguarded. Raises: LockLost."""
        if self._settings.on_lost == "raise" and self._is_cut():
            raise self._loss()

    def _refuse_long_queue(self, space: LockSpace, request: Request, owner: Owner) -> None:
        """Refuse by the queue inside this process; the backend looks at the one in the store."""
        for key in request.keys:
            waiting = space.claims.ahead(key, request)
            if waiting is not None and space.claims.find(key, owner) is None:
                refuse_long_queue(request, waiting, None)

    def _acquire_in_transaction(self, connection: BaseDatabaseWrapper, request: Request) -> Steps[None]:
        if self._footing.home is not None:
            raise LockInTransaction(
                f"lock {self._text!r}: a transaction of Django's is a thread's, so `async with` can't hold its lock; "
                "use `with lock(...)` inside the synchronous function that has atomic()",
                self._text,
            )
        if request.slots > 1:
            raise ConfigurationError(
                f"lock {self._text!r}: slots={request.slots} inside atomic(): slots are held by sessions; "
                "take the lock outside atomic(), or say scope='detached'"
            )
        space = space_at_hand(connection, self._settings) or (yield from space_for(connection, self._settings))
        self._footing.backend = space.backend
        owner = _current_owner()
        outer = tuple(key for key in request.keys if self._is_held_around(space, key, owner))
        if outer:
            # A block around the transaction holds it, on a session: that session would not let our transaction in.
            yield from self._acquire_in_session(space, request._replace(keys=outer))
            inside = self._footing.inside
            for claim in self._footing.claims:
                claim.until = lambda: transaction_of(connection) is inside
        ours = tuple(key for key in request.keys if key not in outer)
        if not ours:
            return
        space.claims.refuse_slots(ours)
        attempt = TransactionLock(connection, request._replace(keys=ours), space.options)
        if not attempt.acquire():
            raise self._conflict(request, ", ".join(map(str, attempt.holders())) or None)
        self._footing.token = attempt.token
        self._transaction = attempt

    def _is_held_around(self, space: LockSpace, key: LockKey, owner: Owner) -> bool:
        """Say whether this flow holds `key` already, by a block that the transaction is inside of.

        Raises: LockInTransaction: by one that is inside the transaction, and ends before it.
        """
        claim = space.claims.find(key, owner)
        if claim is None:
            return False
        if all(footing.inside is self._footing.inside for footing in claim.stands):
            raise LockInTransaction(
                f"lock {key.text!r} is held by scope='detached' inside this transaction, and would be released before "
                "its commit; take it without `scope` from the start, or before atomic()",
                key.text,
            )
        return True

    def _conflict(self, request: Request, holder: str | None) -> LockAcquireTimeout:
        waited = time.monotonic() - self._footing.since
        self._emit("conflicted", waited=waited, timeout=request.timeout, holder=holder)
        return LockAcquireTimeout(None, self._text, request.timeout, round(waited, 3), holder)

    def _enter_context(self, *, keep: bool) -> None:
        self._active = True
        if self._net is not None:  # pragma: no branch - it is None once the lock was left
            stack = _stack.get()
            while stack is not None and ((top := stack[0]()) is None or not top._active):
                stack = stack[1]  # it was released in another context
            _stack.set((self._net, stack))
        if keep:
            if self._transaction is not None:  # nobody releases what ends with its transaction
                _kept.difference_update([one for one in tuple(_kept) if one._ended_before(self._transaction)])
            _kept.add(self)

    def _run_in_transaction(self, statement: str) -> bool:
        """Run a statement in the transaction that holds the lock; False: none does. Raises: LockUnavailable."""
        if self._transaction is not None:
            self._transaction.run(statement)
        return self._transaction is not None

    def _ended_before(self, later: TransactionLock) -> bool:
        return self._transaction is not None and self._transaction.ended_before(later)

    # The ways out.

    def _release(self, error: BaseException | None) -> None:
        """Release; `error`: what the body raised, which a loss must not hide."""
        try:
            released = drive(self._give_up())
            self._leave_context()
        except BaseException:
            self._abandon()
            raise
        self._report(error, released=released)

    async def _arelease(self, error: BaseException | None) -> None:
        try:
            released = await adrive(self._give_up())
            self._leave_context()
        except BaseException:
            await self._aabandon()
            raise
        self._report(error, released=released)
        await atake_turns()

    def _report(self, error: BaseException | None, *, released: bool) -> None:
        if instrumentation.hooks:
            self._emit("released", held=time.monotonic() - self._footing.since - self.waited)
        if not released:
            self._tell_lost()
        if self._lost:
            self._report_loss(error)

    def _give_up(self) -> Steps[bool]:
        """Release what the acquisition stands on; False when it was gone already."""
        footing = self._footing
        released = self._transaction is None or not self._transaction.is_cut() or self._transaction.is_over()
        if footing.ownership is not None:
            last, held = footing.ownership.leaving(footing)
            if held:
                released &= yield from footing.backend.release(footing, held)
            for claim in last:
                footing.ownership.leave(claim)
            footing.claims.clear()
        self._active = False
        return released

    def _abandon(self) -> None:
        """Undo whatever was reached: nothing is held or awaited afterwards. Twice is the same as once."""
        self._active = False
        undo(self._footing)
        self._leave_context()

    async def _aabandon(self) -> None:
        self._active = False
        await finish(undo_steps(self._footing))
        self._leave_context()

    def _leave_context(self) -> None:
        # Nobody may know the net any more: its callback would run at every end of a lock, and swallow interrupts.
        net, self._net = self._net, None
        self._footing.lock = self._footing.owner = None
        if net is not None:
            _nets.discard(net)
            stack = _stack.get()
            _stack.set(stack[1] if stack is not None and stack[0] is net else _without(net, stack))
        _kept.discard(self)

    # Loss.

    def _is_cut(self) -> bool:
        if self._transaction is not None and self._transaction.is_cut():
            return True
        footing = self._footing
        return any(claim.held and footing.backend.is_lost(claim) for claim in footing.claims)

    def _tell_lost(self) -> None:
        """Say it once: to the log, the hooks, and the callbacks."""
        if self._lost:
            return
        self._lost = True
        try:
            instrumentation.tell_apart(partial(instrumentation.emit, LockEvent("lost", self.keys)))
        finally:  # an exception for this thread may have come
            self._call_at_home()

    def _call_at_home(self) -> None:
        home = self._footing.home
        if home is not None and home.is_running() and home is not running_loop():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                home.call_soon_threadsafe(self._call_back)
        else:
            self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            callback = self._callbacks.popleft()
            try:
                callback(self)
            except Exception as error:  # noqa: BLE001 - logged; one callback must not keep the others from hearing
                failed = "a callback on the loss of lock %r failed"
                instrumentation.tell_apart(partial(instrumentation.logger.error, failed, self._text, exc_info=error))

    def _report_loss(self, error: BaseException | None) -> None:
        if self._settings.on_lost != "raise":
            return
        if error is None:
            raise self._loss()
        if hasattr(error, "add_note"):  # pragma: no branch - Python 3.10 has no notes
            error.add_note(str(self._loss()))

    def _loss(self) -> LockLost:
        return LockLost(
            f"lock {self._text!r} was lost while it was held: its session was cut, so others may have entered; "
            "treat what was done since as unguarded",
            self._text,
        )

    def _emit(self, kind: EventKind, **fields: Any) -> None:  # noqa: ANN401 - the fields of LockEvent
        instrumentation.emit(LockEvent(kind, self.keys, **fields))


def undo_steps(footing: Footing) -> Steps[None]:
    """Undo whatever `footing` says, in the store and in this process. Twice is the same as once."""
    ownership = footing.ownership
    if ownership is None or footing.pid != forks.pid:
        return
    claims, _ = ownership.leaving(footing)
    try:
        yield from footing.backend.undo(footing, claims)
    finally:
        for claim in claims:
            ownership.leave(claim)
        footing.claims.clear()


def undo(footing: Footing) -> None:
    """Undo what `footing` says, at once."""
    drive(undo_steps(footing))


class _Net(weakref.ref["HeldLock"]):
    """Catches a lock whose block was left by an exception that hit `__exit__` before its first line.

    A weak reference with a callback, since a `__del__` would run at every end of a lock, and swallow whatever a signal
    handler raises just then.
    """

    __slots__ = ("footing",)

    footing: Footing


_nets: set[_Net] = set()


def _catch(net: _Net) -> None:
    """End the session of a lock that nobody can release any more.

    The collector comes at any time: where this thread is in the middle of a change, another one does it after that.
    """
    _nets.discard(net)
    footing = net.footing
    if footing.is_amid_change():
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and its sessions with it
            threads.start(partial(undo, footing), "concurrency_safe undo")
    else:
        undo(footing)


def _without(net: _Net, stack: _Stack) -> _Stack:
    above: list[_Net] = []
    while stack is not None:
        top, stack = stack
        if top is net:
            break
        above.append(top)
    for one in reversed(above):
        stack = (one, stack)
    return stack


def _stacked_locks() -> Iterator[HeldLock]:
    """Give the locks that the running thread or task has entered, the innermost first."""
    stack = _stack.get()
    while stack is not None:
        reference, stack = stack
        held = reference()
        if held is not None:
            yield held


def _active_locks() -> Iterator[HeldLock]:
    """Give those that it holds."""
    return (held for held in _stacked_locks() if held.is_active)


def current_lock() -> HeldLock | None:
    """Give the innermost lock that the running thread or task holds, or None."""
    return next(_active_locks(), None)


def assert_locked(*keys: Key) -> None:
    """Make sure that the running thread or task holds every one of `keys` (none given: any lock).

    Raises: LockNotHeld: it doesn't. LockLost: it did, and the lock went away.
    """
    active = list(_active_locks())
    if not keys:
        if not active:
            raise LockNotHeld("no lock is held here; call this inside `with lock(...)` or a guarded function")
        active[0].check()
    namespace = get_settings().namespace if keys else ""
    for key in keys:
        wanted = lock_key(key, namespace)
        held = next((one for one in active if wanted in one._keys), None)
        if held is None:
            texts = ", ".join(repr(text) for one in active for text in one.keys) or "none"
            raise LockNotHeld(f"lock {wanted.text!r} is not held here; held: {texts}", wanted.text)
        held.check()


def _current_owner() -> Owner:
    """Give the owner of the locks that the running flow holds; a new one when it holds none."""
    who, part = running()
    stack = _stack.get()
    while stack is not None:
        net, stack = stack
        owner = net.footing.owner
        if owner is not None and owner.is_running(who, part):
            return owner
    return Owner(who, part)


def _by_number(key: LockKey) -> int:
    return key.number


def _is_transactional(
    options: LockOptions, connection: BaseDatabaseWrapper, keys: tuple[LockKey, ...], inside: object | None
) -> bool:
    """Decide whether the lock is held by `inside`, the open transaction of `connection`.

    Raises: LockInTransaction, ConfigurationError.
    """
    scope = options.scope
    if scope == "detached":
        return False
    if inside is None and scope != "transaction":
        where = other_in_transaction(connection.alias)
        if where is None:
            return False
    elif inside is not None and scope != "session":
        require_postgresql(connection)
        return True
    else:
        where = connection.alias
    text = ", ".join(key.text for key in keys)
    if scope == "transaction":
        raise LockInTransaction(
            f"lock {text!r}: scope='transaction' needs an open transaction on {where!r}; put the lock inside atomic()",
            text,
        )
    raise LockInTransaction(
        f"lock {text!r} would be released before the transaction on {where!r} commits, and its updates could "
        "be lost; take the lock outside atomic(), or on that transaction "
        f"(scope='auto' or 'transaction', using={where!r}), "
        "or say scope='detached' when it protects something other than that transaction's rows",
        text,
    )


def _describe(claim: Claim) -> str:
    what = f" {describe_work(claim.work)}" if claim.work else ""
    return f"{claim.owner} of this process (pid {forks.pid}){what}"
