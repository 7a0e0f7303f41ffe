"""Named locks on PostgreSQL: no two runs of the same work at once, in any process on the database."""

from concurrency_safe.conf import configure
from concurrency_safe.core.errors import (
    ConcurrencySafeError,
    ConfigurationError,
    KeyTemplateError,
    LockAcquireTimeout,
    LockCapacityError,
    LockDeadlock,
    LockInTransaction,
    LockLost,
    LockNotHeld,
    LockReentrancyError,
    LockUnavailable,
)
from concurrency_safe.core.policies import Call, Raise, Retry, Skip
from concurrency_safe.guards import Guard, concurrency_safe
from concurrency_safe.locks import HeldLock, Lock, assert_locked, current_lock, lock

__all__ = [
    "Call",
    "ConcurrencySafeError",
    "ConfigurationError",
    "Guard",
    "HeldLock",
    "KeyTemplateError",
    "Lock",
    "LockAcquireTimeout",
    "LockCapacityError",
    "LockDeadlock",
    "LockInTransaction",
    "LockLost",
    "LockNotHeld",
    "LockReentrancyError",
    "LockUnavailable",
    "Raise",
    "Retry",
    "Skip",
    "assert_locked",
    "concurrency_safe",
    "configure",
    "current_lock",
    "lock",
]
