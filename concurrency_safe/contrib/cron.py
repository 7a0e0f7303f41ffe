"""Cron jobs that are started on every host, and run on one: `cron_guard` for functions, `GuardedCommand` for Django."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from django.core.management.base import BaseCommand, CommandError, OutputWrapper

from concurrency_safe.conf import get_settings
from concurrency_safe.core.errors import ConfigurationError, LockAcquireTimeout, LockLost, LockUnavailable
from concurrency_safe.core.options import is_number
from concurrency_safe.core.policies import Skip
from concurrency_safe.core.ticks import TickRule, tick_rule
from concurrency_safe.guards import DIRECT, Guard, Verbs
from concurrency_safe.locks import current_lock
from concurrency_safe.ticks import Tick, last_success

__all__ = ["GuardedCommand", "cron_guard", "last_success"]

P = ParamSpec("P")
R = TypeVar("R")

#: Exit statuses, by sysexits.h: EX_TEMPFAIL (another host runs it), EX_UNAVAILABLE (no lock store), and EX_PROTOCOL,
#: which stands for a lock that was lost while the job ran.
BUSY, NO_STORE, LOST = 75, 69, 76

#: The verbosity from which a command says that it was skipped; cron mails every line.
VERBOSE = 2


def cron_guard(
    key: Any,
    *,
    on_conflict: Any = "skip",
    timeout: float | None = 0,
    min_hold: float | None = None,
    once_per: str | None = None,
    retry_failed_tick: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a job that is started on every host run on one.

        @cron_guard("nightly-report", once_per="day")
        def nightly_report(): ...

    `key` and `on_conflict`: see `Guard`; a skipped call returns None. `timeout`: seconds to wait for the host that
    runs it; 0 tries once; None waits for ever. `min_hold`: seconds that the lock is kept at least, past the body's end
    if need be, so that a host whose clock is late finds it taken: more than the hosts' clocks differ, less than the
    time between two runs. None and 0: no longer than the body runs. A process that is killed keeps nothing.

    `once_per`: "minute", "hour", "day" or a number of seconds, "90s": the job runs once in each such period of UTC, by
    the database's clock; a further call returns None, whatever `on_conflict` says. Hosts' clocks may be wrong by 30
    seconds, or by half of a period that is no number of minutes. It needs a table (`manage.py migrate`, or
    `concurrency-safe init`). None: no such rule. `retry_failed_tick`: True: a further call runs when the one before
    raised, or its process died; False: at most one run, whatever became of it.

    Raises: ConfigurationError, KeyTemplateError: at decoration. By the call: what `Guard.run` raises.
    """
    if min_hold is not None and not is_number(min_hold, at_least=0):
        raise ConfigurationError(f"cron_guard({key!r}): min_hold={min_hold!r} is not a number of seconds >= 0, or None")
    guard = Guard(key, on_conflict=on_conflict, timeout=timeout)
    rule = tick_rule(once_per, retry_failed=retry_failed_tick)

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        guarded = guard(fn)  # refuses what can't be guarded
        if min_hold is None and rule is None:
            return guarded
        body = _slow_to_leave(fn, min_hold) if min_hold else fn
        return guard(_once_per_tick(body, rule) if rule else body)

    return decorate


def _once_per_tick(fn: Callable[P, R], rule: TickRule, told: Callable[[], object] = lambda: None) -> Callable[P, R]:
    """Let a call of `fn` return None, and call `told`, when the tick of now was run already."""
    if inspect.iscoroutinefunction(fn):

        @wraps(fn)
        async def once_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
            tick = _tick(rule)
            if tick is None:
                return await fn(*args, **kwargs)
            if not await tick.aclaim():
                told()
                return None
            result = await fn(*args, **kwargs)
            await tick.asucceed()
            return result

        return cast("Callable[P, R]", once_coroutine)  # R is an awaitable here

    @wraps(fn)
    def once(*args: P.args, **kwargs: P.kwargs) -> Any:
        tick = _tick(rule)
        if tick is None:
            return fn(*args, **kwargs)
        if not tick.claim():
            told()
            return None
        return _recorded(tick, partial(fn, *args, **kwargs))

    return once


def _recorded(tick: Tick, run: Callable[[], R]) -> R:
    try:
        result = run()
    except SystemExit as leaving:
        if not leaving.code:
            tick.succeed()
        raise
    if not inspect.iscoroutine(result):  # which the guard refuses: nothing has run
        tick.succeed()
    return result


def _tick(rule: TickRule) -> Tick | None:
    """Give the tick of this run; None where locks are switched off."""
    held = current_lock()
    return None if held is None or not get_settings().enabled else Tick(rule, held)


def _slow_to_leave(fn: Callable[P, R], seconds: float) -> Callable[P, R]:
    """Let every call of `fn` last `seconds` at least, unless it is interrupted or the lock is lost."""
    if inspect.iscoroutinefunction(fn):

        @wraps(fn)
        async def slow_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
            until = time.monotonic() + seconds
            try:
                result = await fn(*args, **kwargs)
            except Exception:
                await _arest(until)
                raise
            await _arest(until)
            return result

        return cast("Callable[P, R]", slow_coroutine)  # R is an awaitable here

    @wraps(fn)
    def slow(*args: P.args, **kwargs: P.kwargs) -> R:
        until = time.monotonic() + seconds
        try:
            result = fn(*args, **kwargs)
        except Exception:
            _rest(until)
            raise
        _rest(until)
        return result

    return slow


def _rest(until: float) -> None:
    held, lost = current_lock(), threading.Event()
    if held is None or not get_settings().enabled:
        return
    held.on_lost(lambda _: lost.set())
    if not held.is_lost:
        lost.wait(max(0.0, until - time.monotonic()))


async def _arest(until: float) -> None:
    held, lost = current_lock(), asyncio.Event()
    if held is None or not get_settings().enabled:
        return
    held.on_lost(lambda _: lost.set())
    if not held.is_lost:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(lost.wait(), max(0.0, until - time.monotonic()))


class GuardedCommand(BaseCommand):
    """A management command that runs once at a time, on whatever host it is started.

        class Command(GuardedCommand):
            lock_key = "nightly-report:{shop}"

            def handle(self, *args, shop, **options): ...

    `lock_key`: a template whose fields are the command's options, a tuple of such parts, or a method that gets them.
    `lock_timeout`: seconds to wait; 0 tries once; None waits for ever. `on_conflict`: "raise" (exit status 75), "skip"
    (exit status 0; it says so from `--verbosity 2` on), a method that gets the options, or a policy value.
    `once_per`, `retry_failed_tick`: see `cron_guard`; a run that is left out is skipped in the same way.

    Exit status, and `returncode` of the `CommandError` that `call_command` raises: 75 when another one runs, 69 when
    the lock store can't be used (the command did not run), 76 when the lock was lost while it ran.
    """

    lock_key: ClassVar[Any] = None
    lock_timeout: ClassVar[float | None] = 0
    on_conflict: ClassVar[Any] = "raise"
    once_per: ClassVar[str | None] = None
    retry_failed_tick: ClassVar[bool] = False

    def execute(self, *args: Any, **options: Any) -> str | None:
        """Run the command, its checks included, under its lock.

        Raises: CommandError, ConfigurationError, KeyTemplateError.
        """
        name = type(self).__module__.rpartition(".")[2]
        if self.lock_key is None or self.lock_key is True:
            raise ConfigurationError(
                f"the command {name} has lock_key={self.lock_key!r}; give it a text, which may name its options: "
                f'lock_key = "{name}:{{shop}}"'
            )
        guard = Guard(self.lock_key, timeout=self.lock_timeout, on_conflict=self.on_conflict)
        rule = tick_rule(self.once_per, retry_failed=self.retry_failed_tick)
        output: str | None = self.run_guarded(guard, rule, super().execute, *args, **options)
        return output

    def run_guarded(
        self, guard: Guard, rule: TickRule | None, body: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        """Call `body`, guarded; what keeps it from running becomes a `CommandError` with the exit status for it."""

        def tell(why: object) -> None:
            if options.get("verbosity", 1) >= VERBOSE:
                given = options.get("stderr")  # of `call_command`
                (OutputWrapper(given) if given else self.stderr).write(f"skipped: {why}")

        def skip(policy: Skip, conflict: LockAcquireTimeout) -> Any:
            tell(conflict)
            return policy.result

        verbs = Verbs(retry=DIRECT.retry, skip=skip)
        left: list[SystemExit] = []
        with _exit_statuses() as entered:

            def enter(*args: Any, **options: Any) -> Any:
                entered.set()
                try:
                    return body(*args, **options)
                except SystemExit as leaving:
                    if leaving.code:
                        raise
                    left.append(leaving)  # with success, unless the lock turns out to be lost
                    return None

            job = _once_per_tick(enter, rule, lambda: tell("it was run in this period already")) if rule else enter
            result = guard.run_as(guard.template(body), job, args, options, verbs)
        if left:
            raise left[0]
        return result


@contextmanager
def _exit_statuses() -> Iterator[threading.Event]:
    """Give the errors of a lock their exit statuses. The block sets the event when the body begins.

    From then on a conflict, or a store that is down, is an error of the body's own.
    """
    entered = threading.Event()
    try:
        yield entered
    except LockAcquireTimeout as error:
        if entered.is_set():
            raise
        raise CommandError(str(error), returncode=BUSY) from error
    except LockUnavailable as error:
        if entered.is_set():
            raise
        raise CommandError(f"not run: {error}", returncode=NO_STORE) from error
    except LockLost as error:
        raise CommandError(str(error), returncode=LOST) from error
