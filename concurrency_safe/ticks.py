"""Once per tick: a scheduled job runs once for each scheduled time, on however many hosts it is started.

A lock keeps runs from overlapping. A short job is over when a host whose clock is late starts it: only a row that says
"this tick was run" keeps that one out. It is claimed inside the lock, and marked when the run has succeeded.
"""

from __future__ import annotations

from datetime import datetime, timezone

from concurrency_safe import instrumentation
from concurrency_safe.conf import get_settings
from concurrency_safe.core.errors import LockUnavailable
from concurrency_safe.core.keys import LockKey, lock_key
from concurrency_safe.core.steps import Steps
from concurrency_safe.core.ticks import TickRule
from concurrency_safe.locks import HeldLock
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres import sql, ticks
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.spaces import aask, ask


def last_success(name: str | tuple[object, ...]) -> datetime | None:
    """Tell when the job with the lock key `name` last ended with success; None: never, or it has no ticks.

    For monitoring: "no success for 25 hours". An aware datetime in UTC, by the database's clock; what is older than 30
    days is forgotten at the next success.

    Raises: ConfigurationError: there is no table. LockUnavailable. KeyTemplateError.
    """
    key = lock_key(name, get_settings().namespace)
    when = ask(lambda backend, footing: ticks.last_success(backend, footing, key))
    return None if when is None else datetime.fromtimestamp(when, timezone.utc)


def create_tables() -> None:
    """Create what the library keeps in the database, as Django's migrations do. Twice is the same as once.

    Raises: LockUnavailable, ConfigurationError.
    """
    ask(ticks.create_tables)


class Tick:
    """One run of a job that holds its lock: is it due, and did it succeed?"""

    def __init__(self, rule: TickRule, held: HeldLock) -> None:
        """Take the lock that the run holds."""
        self._rule = rule
        self._held = held
        self._key: LockKey = held._keys[0]
        self._claimed: float | None = None

    def claim(self) -> bool:
        """Write down that the tick of now is run; False: it was run already, so don't.

        Raises: LockUnavailable, ConfigurationError: it must not be run.
        """
        return self._claims(ask(self._claim_steps))

    async def aclaim(self) -> bool:
        """See `claim`; the event loop goes on."""
        return self._claims(await aask(self._claim_steps))

    def succeed(self) -> LockUnavailable | None:
        """Write down that the run has succeeded: in the transaction that holds the lock, or else at once.

        Not when the lock was lost. Where it fails that is logged, and given: the run is over.
        """
        if self._held.is_lost:
            return None
        try:
            if not self._held._run_in_transaction(sql.succeed_tick(self._key.number, self._claimed or 0.0)):
                ask(self._succeed_steps)
        except LockUnavailable as error:
            self._warn(error)
            return error
        return None

    async def asucceed(self) -> None:
        """See `succeed`; the event loop goes on."""
        if self._held.is_lost:
            return
        try:
            await aask(self._succeed_steps)
        except LockUnavailable as error:
            self._warn(error)

    def _claims(self, tick: float | None) -> bool:
        self._claimed = tick
        if tick is None:
            instrumentation.logger.info("the tick of %r was run already", self._key.text)
        return tick is not None

    def _claim_steps(self, backend: PostgresBackend, footing: Footing) -> Steps[float | None]:
        return ticks.claim(backend, footing, self._key, self._rule, self._held.waited)

    def _succeed_steps(self, backend: PostgresBackend, footing: Footing) -> Steps[None]:
        return ticks.succeed(backend, footing, self._key, self._claimed or 0.0)

    def _warn(self, error: LockUnavailable) -> None:
        instrumentation.logger.warning("a tick of %r succeeded, which was not recorded: %s", self._key.text, error)
