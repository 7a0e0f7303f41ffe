"""`lock()`: one acquisition (`Lock`), and the proof of holding it (`HeldLock`).

Here is decided in which scope a lock is held, and that every way out of an acquisition but success leaves nothing
behind: what an acquisition stands on is written into its `HeldLock` step by step, and dropping that undoes it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from concurrency_safe import instrumentation
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
from concurrency_safe.core.options import UNSET, LockOptions, Unset
from concurrency_safe.core.steps import Steps
from concurrency_safe.ownership import Claim, Footing, current_owner
from concurrency_safe.postgres.alias import (
    in_transaction,
    others_in_transaction,
    require_postgresql,
)
from concurrency_safe.postgres.inspect import describe_work
from concurrency_safe.postgres.transaction import TransactionLock
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.spaces import LockSpace, django_connection, require_one_space, space_for

if TYPE_CHECKING:
    from types import TracebackType

    from django.db.backends.base.base import BaseDatabaseWrapper

Key = str | tuple[object, ...]

#: Whose work the running thread or task does: an adapter sets a task's id, so that a conflict can name the holder.
current_work: ContextVar[str | None] = ContextVar("concurrency_safe_work", default=None)

#: The locks that the running thread or task holds, innermost last. Weak: it must not keep a forgotten one alive.
_stack: ContextVar[tuple[_Net, ...]] = ContextVar("concurrency_safe", default=())

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
        keys: A text, or a tuple of parts. The same key is the same lock in every process on the database.
        timeout: Seconds to wait; 0 tries once; None waits for ever. Default: the setting TIMEOUT, 3.0.
        scope: "session" holds it on a private connection until the block ends. "transaction" holds it on Django's
            connection until its outermost commit or rollback. "auto": "transaction" inside `atomic()`, else
            "session". "detached": a private connection also inside a transaction.
        using: The Django alias; default: the setting USING.
        shared, slots, backend, max_waiters: Reserved; not in this release.

    Raises:
        ConfigurationError, KeyTemplateError: At once, for a bad option or key.
        LockAcquireTimeout, LockUnavailable, LockInTransaction, LockReentrancyError, LockCapacityError: By `with`.
    """
    options = LockOptions(
        timeout=timeout,
        shared=shared,
        slots=slots,
        scope=scope,
        using=using,
        backend=backend,
        max_waiters=max_waiters,
    )
    single = Lock(keys, options)
    lock_key(keys[0])  # a bad key is an error of this line, not of the `with`
    return single


class Lock:
    """One acquisition: enter it once."""

    __slots__ = ("_held", "_key", "_options", "failure")

    def __init__(self, keys: tuple[Key, ...], options: LockOptions) -> None:
        """Check the keys and what this release can do; nothing is acquired."""
        self._key: Key = keys[0] if keys else ""
        if not keys:
            raise ConfigurationError('lock() needs a key: lock("stock:ABC"), or a tuple of parts, lock(("stock", sku))')
        if len(keys) > 1:
            raise ConfigurationError(f"lock({keys[0]!r}, ...): several keys are not in this release; nest two locks")
        refuse_reserved(options, self)
        self._options = options
        self._held: HeldLock | None = None
        #: The error that ended the acquisition, so that a caller can tell it from one of the body's.
        self.failure: ConcurrencySafeError | None = None

    def __repr__(self) -> str:
        """Show the key."""
        return f"<Lock {self._key!r}>"

    def __enter__(self) -> HeldLock:
        """Acquire the lock."""
        return self._enter(keep=False)

    def _enter(self, *, keep: bool) -> HeldLock:
        if self._held is not None or self.failure is not None:
            raise LockReentrancyError(
                f"lock {self._key!r} was entered already; a Lock is one acquisition: call lock(...) again",
                str(self._key),
            )
        settings = get_settings()
        held = self._held = HeldLock(lock_key(self._key, settings.namespace), settings)
        try:
            if settings.enabled:
                held._acquire(self._options)
            held._enter_context()
            if keep:
                _kept.add(held)
            return held
        except BaseException as error:
            held._abandon()
            if isinstance(error, ConcurrencySafeError):
                self.failure = error
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock; in transaction scope it stays until the commit or rollback."""
        if self._held is not None and self._held._is_entered:
            self._held._release(error)

    def acquire(self) -> HeldLock:
        """Acquire the lock without a block; it is held until `HeldLock.release()`, or the end of the process."""
        return self._enter(keep=True)

    async def __aenter__(self) -> NoReturn:
        """Refuse: async support is not in this release."""
        raise ConfigurationError(
            "`async with lock(...)` is not in this release; use `with` in a thread (sync_to_async)"
        )

    async def __aexit__(self, *exc: object) -> None:
        """Do nothing: nothing was entered."""


class HeldLock:
    """The proof of holding a lock, and the way to release it."""

    __slots__ = (
        "__weakref__",
        "_active",
        "_callbacks",
        "_footing",
        "_key",
        "_lost",
        "_net",
        "_pid",
        "_settings",
        "_since",
        "_space",
        "_transaction",
        "token",
        "waited",
    )

    def __init__(self, key: LockKey, settings: Settings) -> None:
        """Prepare an acquisition of `key`: it stands on nothing yet."""
        self._key = key
        self._settings = settings
        self._pid = os.getpid()
        self._space: LockSpace | None = None
        self._transaction: TransactionLock | None = None
        self._callbacks: tuple[Callable[[HeldLock], object], ...] = ()
        self._lost = False
        self._since = time.monotonic()
        self._active = False
        #: Seconds that the acquisition took.
        self.waited = 0.0
        #: The fencing token; None: fencing is not enabled.
        self.token: int | None = None
        self._footing = Footing(current_work.get())
        self._net: _Net | None = _Net(self, _catch)
        self._net.footing = self._footing
        _nets.add(self._net)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, as text."""
        return (self._key.text,)

    @property
    def is_active(self) -> bool:
        """Whether it was acquired, by this process, and neither released nor ended with its transaction yet."""
        return self._is_entered and not (self._transaction is not None and self._transaction.is_over())

    @property
    def _is_entered(self) -> bool:
        return self._active and self._pid == os.getpid()

    def __repr__(self) -> str:
        """Show the key and the state."""
        return f"<HeldLock {self._key.text!r} {'held' if self.is_active else 'not held'}>"

    @property
    def is_lost(self) -> bool:
        """Whether the lock went away while it was held: its session was cut. Costs no query."""
        if not self._lost and self.is_active:
            self._lost = self._is_cut()
            if self._lost:
                self._tell_lost()
        return self._lost

    def check(self) -> None:
        """Make sure that the lock is still held.

        Raises: LockLost: it went away. LockNotHeld: it was released.
        """
        if self.is_lost:
            raise self._loss()
        if not self.is_active:
            raise LockNotHeld(f"lock {self._key.text!r} is not held any more", self._key.text)

    def on_lost(self, callback: Callable[[HeldLock], object]) -> None:
        """Call `callback(held)` when the loss of the lock is noticed: by `is_lost`, by `check()`, or at the release."""
        self._callbacks = (*self._callbacks, callback)

    def release(self) -> None:
        """Release the lock now; in transaction scope it stays until the commit or rollback.

        Raises: LockNotHeld: it was released before. LockLost: it had gone away.
        """
        if not self._is_entered:
            raise LockNotHeld(
                f"lock {self._key.text!r} was released already, or by another process",
                self._key.text,
            )
        self._release(None)

    # The way in. `Lock.__enter__` calls `_abandon` after anything but success.

    def _acquire(self, options: LockOptions) -> None:
        settings = self._settings
        timeout = settings.timeout if options.timeout is UNSET else options.timeout
        self._since = time.monotonic()
        deadline = None if timeout is None else self._since + timeout
        connection = django_connection(options.using, settings)
        if connection is None and options.scope == "transaction":
            raise ConfigurationError(
                f"lock {self._key.text!r}: scope='transaction' needs a Django connection, and Django is not configured"
            )
        if connection is not None and _is_transactional(options, connection, self._key):
            self._acquire_in_transaction(connection, timeout, deadline)
        else:
            self._space = space_for(connection, settings)
            drive(self._acquire_in_session(self._space, timeout, deadline))
        self.waited = time.monotonic() - self._since
        self._emit("acquired", waited=self.waited)

    def _acquire_in_session(self, space: LockSpace, timeout: float | None, deadline: float | None) -> Steps[None]:
        blocker = yield from space.claims.enter(self._footing, self._key, current_owner(), deadline)
        if blocker is not None:
            raise self._conflict(timeout, _describe(blocker))
        claim = self._footing.claim
        if claim is None or claim.count > 1:
            return  # the owner holds it already
        if not (yield from space.backend.acquire(claim, self._key, deadline, timeout)):
            holders = yield from space.backend.holders(claim, self._key)
            space.backend.give_back(claim)
            raise self._conflict(timeout, ", ".join(map(str, holders)) or None)

    def _acquire_in_transaction(
        self, connection: BaseDatabaseWrapper, timeout: float | None, deadline: float | None
    ) -> None:
        settings = self._settings
        if settings.dsn is not None:
            require_one_space(connection, settings.dsn)
        space = space_for(connection, settings)
        if space.claims.find(self._key, current_owner()) is not None:
            # A block around the transaction holds it, on a session: that session would not let our transaction in.
            self._space = space
            drive(space.claims.enter(self._footing, self._key, current_owner(), deadline))
            return
        attempt = TransactionLock(connection, self._key, timeout, settings.max_block)
        if not attempt.acquire(deadline):
            raise self._conflict(timeout, ", ".join(map(str, attempt.holders())) or None)
        self._transaction = attempt

    def _conflict(self, timeout: float | None, holder: str | None) -> LockAcquireTimeout:
        waited = time.monotonic() - self._since
        self._emit("conflicted", waited=waited, timeout=timeout, holder=holder)
        return LockAcquireTimeout(None, self._key.text, timeout, round(waited, 3), holder)

    def _enter_context(self) -> None:
        self._active = True
        if self._net is not None:  # pragma: no branch - it is None once the lock was left
            _stack.set((*_stack.get(), self._net))

    # The ways out.

    def _release(self, error: BaseException | None) -> None:
        """Release; `error`: what the body raised, which a loss must not hide."""
        try:
            released = self._give_up()
            self._leave_context()
        except BaseException:
            self._abandon()
            raise
        self._emit("released", held=time.monotonic() - self._since - self.waited)
        if not released and not self._lost:
            self._tell_lost()
        if self._lost:
            self._report_loss(error)

    def _give_up(self) -> bool:
        """Release what the acquisition stands on; False when it was gone already."""
        claim, space = self._footing.claim, self._space
        released = self._transaction is None or self._transaction.is_over() or not self._transaction.is_cut()
        if claim is not None and space is not None:
            if claim.count == 1:
                released = drive(space.backend.release(claim, self._key))
            self._footing.drop()
        self._active = False
        return released

    def _abandon(self) -> None:
        """Undo whatever was reached: end the session that holds or awaits the lock. Twice is the same as once."""
        self._active = False
        self._footing.drop()
        self._leave_context()

    def _leave_context(self) -> None:
        net, self._net = self._net, None
        if net is not None:
            _nets.discard(net)
            _stack.set(tuple(other for other in _stack.get() if other is not net))
        _kept.discard(self)

    # Loss.

    def _is_cut(self) -> bool:
        if self._transaction is not None:
            return self._transaction.is_cut()
        session = self._footing.claim.session if self._footing.claim is not None else None
        return session is not None and session.is_dead()

    def _tell_lost(self) -> None:
        self._lost = True
        instrumentation.emit(LockEvent("lost", self.keys))
        for callback in self._callbacks:
            callback(self)

    def _report_loss(self, error: BaseException | None) -> None:
        if self._settings.on_lost != "raise":
            return
        if error is None:
            raise self._loss()
        if hasattr(error, "add_note"):  # pragma: no branch - Python 3.10 has no notes
            error.add_note(str(self._loss()))

    def _loss(self) -> LockLost:
        return LockLost(
            f"lock {self._key.text!r} was lost while it was held: its session was cut, so others may have entered; "
            "treat what was done since as unguarded",
            self._key.text,
        )

    def _emit(self, kind: EventKind, **fields: Any) -> None:  # noqa: ANN401 - the fields of LockEvent
        if kind == "conflicted" or instrumentation.hooked():
            instrumentation.emit(LockEvent(kind, self.keys, **fields))


class _Net(weakref.ref["HeldLock"]):
    """Catches a lock whose block was left by an exception that hit `__exit__` before its first line.

    A weak reference with a callback, since a `__del__` would run at every end of a lock, and swallow whatever a signal
    handler raises just then.
    """

    __slots__ = ("footing",)

    footing: Footing


_nets: set[_Net] = set()


def _catch(net: _Net) -> None:
    """End the session of a lock that nobody can release any more."""
    _nets.discard(net)
    net.footing.drop()


def current_lock() -> HeldLock | None:
    """Give the innermost lock that the running thread or task holds, or None."""
    for reference in reversed(_stack.get()):
        held = reference()
        if held is not None and held.is_active:
            return held
    return None


def assert_locked(*keys: Key) -> None:
    """Make sure that the running thread or task holds every one of `keys` (none given: any lock).

    Raises: LockNotHeld: it doesn't. LockLost: it did, and the lock went away.
    """
    active = [held for held in (reference() for reference in _stack.get()) if held is not None and held.is_active]
    if not keys:
        if not active:
            raise LockNotHeld("no lock is held here; call this inside `with lock(...)` or a guarded function")
        active[-1].check()
    namespace = get_settings().namespace if keys else ""
    for key in keys:
        wanted = lock_key(key, namespace)
        held = next((one for one in active if one._key == wanted), None)
        if held is None:
            texts = ", ".join(repr(text) for one in active for text in one.keys) or "none"
            raise LockNotHeld(f"lock {wanted.text!r} is not held here; held: {texts}", wanted.text)
        held.check()


def _is_transactional(options: LockOptions, connection: BaseDatabaseWrapper, key: LockKey) -> bool:
    """Decide whether the lock is held by the transaction of `connection`.

    Raises: LockInTransaction, ConfigurationError.
    """
    scope = options.scope
    inside = in_transaction(connection)
    if scope == "transaction" and not inside:
        raise LockInTransaction(
            f"lock {key.text!r}: scope='transaction' needs an open transaction on {connection.alias!r}; "
            "put the lock inside atomic()",
            key.text,
        )
    if scope == "detached":
        return False
    if inside and scope != "session":
        require_postgresql(connection)
        return True
    where = connection.alias if inside else next(others_in_transaction(connection.alias), None)
    if where is None:
        return False
    raise LockInTransaction(
        f"lock {key.text!r} would be released before the transaction on {where!r} commits, and its updates could "
        "be lost; take the lock outside atomic(), or on that transaction "
        f"(scope='auto' or 'transaction', using={where!r}), "
        "or say scope='detached' when it protects something other than that transaction's rows",
        key.text,
    )


def _describe(claim: Claim) -> str:
    name = getattr(claim.owner, "name", None)
    who = f"thread {name!r}" if name else repr(claim.owner)
    what = f" {describe_work(claim.work)}" if claim.work else ""
    return f"{who} of this process (pid {os.getpid()}){what}"


def refuse_reserved(options: LockOptions, what: object) -> None:
    """Refuse, by name, the options that the contract has and this release hasn't; `what` has them.

    Raises: ConfigurationError.
    """
    reserved = {
        "shared=True": options.shared,
        "slots": options.slots != 1,
        "backend": options.backend is not None,
        "max_waiters": options.max_waiters is not None,
    }
    for name, used in reserved.items():
        if used:
            raise ConfigurationError(f"{what!r}: {name} is not in this release, which has exclusive locks only")
