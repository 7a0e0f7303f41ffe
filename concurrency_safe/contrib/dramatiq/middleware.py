"""`ConcurrencySafeMiddleware`: the body of an actor runs while its lock is held, and only then.

The guard is put around the actor's function when the actor is declared. Not into `before_process_message`: Dramatiq
logs what a hook raises, and runs the actor all the same.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from dramatiq.asyncio import async_to_sync
from dramatiq.common import q_name
from dramatiq.middleware import Middleware, ShutdownNotifications, TimeLimit

from concurrency_safe.contrib.dramatiq import options, outcomes, requeue
from concurrency_safe.core.errors import LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import Retry, Skip
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import DIRECT, Guard, Verbs
from concurrency_safe.locks import current_work
from concurrency_safe.postgres.inspect import describe_work
from concurrency_safe.spaces import close_idle_sessions

logger = logging.getLogger("concurrency_safe")

#: The message that this thread processes, until its actor is entered.
_arriving: ContextVar[Any] = ContextVar("concurrency_safe_message", default=None)

#: Milliseconds that a worker with nothing to do lets pass before it looks into such a queue again.
LOOK = 200

#: The attribute of an actor's function that is guarded.
_GUARDED = "concurrency_safe_body"


async def _nothing() -> None: ...


#: The code of what Dramatiq makes of an `async def`. A decorator that runs a coroutine itself is wrapped likewise.
_BRIDGE = async_to_sync(_nothing).__code__


class ConcurrencySafeMiddleware(Middleware):
    """Guards actors by their `lock_key`.

    Options of `@dramatiq.actor`, and of `send_with_options` for one message:
        lock_key: A template over the body's arguments, a tuple of parts, a callable that gets the arguments (never
            `self`), True (the actor's name and all arguments), or None: not guarded.
        lock_timeout: Seconds to wait in the worker before `on_conflict` decides; 0 tries once; None waits for ever.
        lock_shared: True: together with other readers.
        lock_slots: Most holders at once.
        on_conflict: "retry" (a copy goes to the queue, with a budget of its own), "skip", "raise", a policy value, or a
            callable that gets the arguments and whose return value is the actor's result.
    """

    @property
    def actor_options(self) -> set[str]:
        """The options that actors may have."""
        return set(options.DECLARABLE)

    def before_declare_actor(self, broker: Any, actor: Any) -> None:
        """Put the guard around the actor's function.

        Raises: ActorOptionError, ActorKeyError: MiddlewareErrors, which end the declaration.
        """
        self._guard(broker, actor)

    def after_declare_actor(self, broker: Any, actor: Any) -> None:
        """Do the same for an actor that was there before this middleware. Dramatiq 1 gives its name."""
        self._guard(broker, broker.get_actor(actor) if isinstance(actor, str) else actor)

    def _guard(self, broker: Any, actor: Any) -> None:
        fn, place = options.body_of(actor)
        if _guarded_body(actor) is None:
            others = (one.actor_options for one in broker.middleware if not isinstance(one, ConcurrencySafeMiddleware))
            setattr(*place, _Body(broker, actor, fn, frozenset().union(*others)).guarded())

    def before_process_message(self, broker: Any, message: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Tell the actor's function which message it runs for."""
        _arriving.set(message)

    def after_process_message(self, broker: Any, message: Any, **_: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Forget it, where the actor was never entered."""
        _arriving.set(None)

    def after_skip_message(self, broker: Any, message: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Forget it, where the actor was never entered."""
        _arriving.set(None)

    def before_worker_boot(self, broker: Any, worker: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Make RabbitMQ confirm what it takes, since an original is acknowledged on the strength of its copy."""
        if getattr(broker, "confirm_delivery", True) is False:
            logger.info("RabbitMQ confirms each message that this worker sends: confirm_delivery is on")
            broker.confirm_delivery = True
        outcomes.watch_hooks(broker)
        skips = logging.getLogger("dramatiq.worker.WorkerThread")
        skips.removeFilter(_is_news)
        skips.addFilter(_is_news)

    def after_consumer_thread_boot(self, broker: Any, thread: Any) -> None:
        """Let a worker look more often into queues to which messages come back.

        By default those of a whole second come at once, and meet one another again.
        """
        queue = q_name(thread.queue_name)
        if any(actor.queue_name == queue and _comes_back(actor) for actor in broker.actors.values()):
            thread.worker_timeout = min(thread.worker_timeout, LOOK)

    def before_ack(self, broker: Any, message: Any) -> None:
        """Note that whatever goes on from the message was told."""
        outcomes.note_told(broker, message)

    def after_worker_shutdown(self, broker: Any, worker: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Close the sessions."""
        close_idle_sessions()


def _comes_back(actor: Any) -> bool:
    """Say whether conflicts send an actor's messages back to their queue."""
    body = _guarded_body(actor)
    return body is not None and body.comes_back


def _guarded_body(actor: Any) -> _Body | None:
    """Give what guards `actor`; None: nothing yet. `functools.wraps` gives the function of another actor's mark on."""
    body = getattr(options.body_of(actor)[0], _GUARDED, None)
    return body if isinstance(body, _Body) and body.actor is actor else None


def _is_news(record: logging.LogRecord) -> bool:
    """Drop Dramatiq's warning that a message was skipped, where it was put back: that was said already, at INFO."""
    args = record.args
    return not (isinstance(args, tuple) and args and hasattr(args[0], requeue.PUT_BACK))


class _Postponed(Exception):
    """The policy says *retry*; carried out in the worker's thread, since an event loop must not wait for the broker."""

    def __init__(self, policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> None:
        super().__init__()
        self.policy = policy
        self.error = error


class _MetItself(Exception):
    """The lock is held for this very message: by a delivery that still runs, or an attempt that still unwinds."""

    def __init__(self, conflict: LockAcquireTimeout) -> None:
        super().__init__()
        self.conflict = conflict


class _Body:
    """The function of one actor, and its guard."""

    def __init__(self, broker: Any, actor: Any, fn: Callable[..., Any], foreign: frozenset[str]) -> None:
        self._broker = broker
        self.actor = actor
        self._foreign = foreign
        self._fn = fn
        self._is_async = getattr(fn, "__code__", None) is _BRIDGE
        self._inner: Callable[..., Any] = fn.__wrapped__ if self._is_async else fn  # type: ignore[attr-defined]
        self._options = options.declared(actor, foreign)
        self._declared = options.build(actor, self._inner, self._options)

    @property
    def comes_back(self) -> bool:
        """Whether a conflict sends a message back to the queue."""
        return self._declared is not None and isinstance(self._declared[0].policy, Retry)

    def guarded(self) -> Callable[..., Any]:
        """Give the function that takes its place."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            message = _arriving.get()
            if message is None or message.actor_name != self.actor.actor_name:
                return self._call_directly(args, kwargs)
            _arriving.set(None)  # what the body calls directly is no message
            return self._process(message, args, kwargs)

        functools.update_wrapper(guarded, self._fn)
        setattr(guarded, _GUARDED, self)
        return guarded

    def _call_directly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._declared is None:
            return self._fn(*args, **kwargs)
        return self._call(self._declared, args, kwargs, DIRECT)

    def _process(self, message: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = options.of_message(self.actor, message, self._foreign)
        options_now = {**self._options, **given}
        declared = options.build(self.actor, self._inner, options_now) if given else self._declared
        if declared is None:
            return self._fn(*args, **kwargs)
        meet = partial(self._ameet if self._is_async else self._meet, message, declared[0])
        work = current_work.set(message.message_id)
        try:
            result = self._call(declared, args, kwargs, Verbs(_postpone, partial(_skip, message), meet), message)
        except _Postponed as postponed:
            self._disarm(message)
            requeue.later(self._broker, message, postponed.policy, postponed.error)
        except _MetItself as met:
            self._disarm(message)
            requeue.duplicate(self._broker, message, met.conflict)
        except outcomes.HasRun as earlier:
            self._disarm(message)
            if earlier.told:
                requeue.drop(message)
            logger.info("message %s has run already; its result goes on", message.message_id)
            result = earlier.result
        finally:
            self._disarm(message)
            current_work.reset(work)
        outcomes.has_run(message)
        return result

    def _call(
        self,
        declared: tuple[Guard, KeyTemplate],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
        message: Any = None,
    ) -> Any:
        """Run the body guarded. `message`: what it runs for; None: a direct call."""
        guard, template = declared
        body = self._abody if self._is_async else self._body
        run = partial(guard.arun_as if self._is_async else guard.run_as, template, body(message), args, kwargs, verbs)
        if message is not None:
            once = guard.arun_once if self._is_async else guard.run_once
            run = partial(once, message.message_id, run, _met, args, kwargs, verbs)
        return _in_loop(run) if self._is_async else run()

    def _body(self, message: Any) -> Callable[..., Any]:
        """Give the body for `message`: a copy may have run already."""
        if message is None or not requeue.is_copy(message):
            return self._fn

        def unless_run(*args: Any, **kwargs: Any) -> Any:
            outcomes.refuse_second_run(self._broker, message, settling=True)
            return self._fn(*args, **kwargs)

        return unless_run

    def _abody(self, message: Any) -> Callable[..., Any]:
        """Do the same for an `async def`, whose loop must not wait for the results."""
        if message is None or not requeue.is_copy(message):
            return self._inner

        async def unless_run(*args: Any, **kwargs: Any) -> Any:
            await asyncio.to_thread(outcomes.refuse_second_run, self._broker, message, settling=True)
            return await self._inner(*args, **kwargs)

        return unless_run

    def _meet(self, message: Any, guard: Guard, conflict: LockAcquireTimeout) -> None:
        """Never skip or fail for a conflict with oneself, nor when the message has run already.

        An unknown holder may be oneself, unless the broker knows better.
        """
        if requeue.is_copy(message):
            outcomes.refuse_second_run(self._broker, message, settling=False)
        itself = describe_work(message.message_id) in (conflict.holder or "")
        unknown = conflict.holder is None and getattr(message, "redelivered", True)
        if itself or (unknown and not isinstance(guard.policy, Retry)):
            raise _MetItself(conflict)

    async def _ameet(self, message: Any, guard: Guard, conflict: LockAcquireTimeout) -> None:
        """Do the same where the loop must not wait for the results."""
        await asyncio.to_thread(self._meet, message, guard, conflict)

    def _disarm(self, message: Any) -> None:
        """Let nothing interrupt what Dramatiq does after the body.

        An interrupt in a hook would end the worker's thread, and lose the message (dramatiq issue 445). Once the lock
        is released, time limits and shutdown notices have nothing left to end.
        """
        for one in self._broker.middleware:
            if isinstance(one, (TimeLimit, ShutdownNotifications)):
                hooks: Any = one
                hooks.after_process_message(self._broker, message)


def _in_loop(call: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine in the event loop of Dramatiq's AsyncIO, whose lock lasts until it has ended, however late.

    The loop's own task holds the lock, so that the body may enter it again.
    """

    async def contained() -> tuple[Any, TimeoutError | None]:
        # Dramatiq 1 takes a coroutine's TimeoutError, which a conflict is, for its own, and waits for ever.
        try:
            return await call(), None
        except TimeoutError as error:
            return None, error

    result, error = async_to_sync(contained)()
    if error is not None:
        raise error
    return result


def _postpone(policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> Any:
    raise _Postponed(policy, error)


def _skip(message: Any, policy: Skip, conflict: LockAcquireTimeout) -> Any:
    """Give the result of a skip. It is a result, since groups and pipelines end silently at a SkipMessage."""
    logger.info("message %s of actor %s was skipped: %s", message.message_id, message.actor_name, conflict)
    return policy.result


def _met(conflict: LockAcquireTimeout) -> Any:
    raise _MetItself(conflict)
