"""Every error of the library.

An error crosses processes: a queue pickles it, a JSON result backend rebuilds it as `type(error)(*error.args)`. So
`args` are exactly the constructor's arguments and JSON-safe, and the message is composed when it is asked for.
"""

from __future__ import annotations


class ConcurrencySafeError(Exception):
    """The root of the library's errors.

    Args:
        message: What happened, to which key, with which numbers, and what to do.
        key: The key's text, where one is concerned.
    """

    def __init__(self, message: str | None = None, key: str | None = None) -> None:
        """Keep the arguments as `args`."""
        # Not by super(): an OSError, which LockAcquireTimeout is, takes two arguments for errno and strerror.
        super().__init__()
        self.args = (message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        """Say what happened; without a message, what the class means."""
        meaning = (type(self).__doc__ or type(self).__name__).partition("\n")[0]
        return self.message or meaning.removesuffix(".")


class LockAcquireTimeout(ConcurrencySafeError, TimeoutError):
    """The lock is held by somebody else, and did not become free in time.

    Args:
        message: None: composed from the others.
        key: The key's text.
        timeout: Seconds that the caller would wait; 0: one try; None: for ever.
        waited: Seconds that the caller did wait.
        holder: Who holds it, in a few words; None: it could not be read, or nobody did any more.
    """

    def __init__(
        self,
        message: str | None = None,
        key: str | None = None,
        timeout: float | None = None,
        waited: float | None = None,
        holder: str | None = None,
    ) -> None:
        """Keep the arguments as `args`."""
        super().__init__(message, key)
        self.args = (message, key, timeout, waited, holder)
        self.timeout = timeout
        self.waited = waited
        self.holder = holder

    def __str__(self) -> str:
        """Say which lock, who holds it, and how long was waited."""
        if self.message is not None:
            return self.message
        lock = f"lock {self.key!r}" if self.key is not None else "a lock"
        holder = self.holder or "somebody else"
        if self.timeout == 0:
            return f"{lock} is held by {holder}; tried once (timeout=0)"
        waited = f" after {_seconds(self.waited)} s" if self.waited is not None else ""
        limit = f" (timeout={self.timeout:.15g})" if self.timeout is not None else ""
        return f"{lock} is held by {holder}; gave up{waited}{limit}"


def _seconds(waited: float) -> str:
    """Show three digits, or whole seconds: nobody reads 1.23e+06."""
    return f"{waited:.3g}" if waited < 1000 else f"{waited:.0f}"  # noqa: PLR2004 - said above


class LockDeadlock(LockAcquireTimeout):
    """PostgreSQL found a deadlock, and chose this waiter as the victim (SQLSTATE 40P01)."""


class LockLost(ConcurrencySafeError):
    """The lock went away while it was held: its session was cut, and others may have entered."""


class LockNotHeld(ConcurrencySafeError):
    """What needs a lock runs without it."""


class LockInTransaction(ConcurrencySafeError):
    """The scope of the lock doesn't fit the transaction that is open, or not open, around it."""


class LockReentrancyError(ConcurrencySafeError):
    """A lock was entered again where that can't work."""


class LockUnavailable(ConcurrencySafeError):
    """The lock store can't be reached or used, so the body did not run."""


class LockCapacityError(LockUnavailable):
    """No room for another lock: in PostgreSQL's lock table (SQLSTATE 53200), or under the process's own cap."""


class KeyTemplateError(ConcurrencySafeError, ValueError):
    """A key, or the template of one, is not usable."""


class ConfigurationError(ConcurrencySafeError, ValueError):
    """An option or a setting is not usable, or nothing is set where something must be."""
