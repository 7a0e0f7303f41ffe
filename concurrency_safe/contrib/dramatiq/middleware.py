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
from typing import Any, NamedTuple

from dramatiq.asyncio import async_to_sync
from dramatiq.common import q_name
from dramatiq.middleware import Middleware

from concurrency_safe import instrumentation
from concurrency_safe.contrib.dramatiq import options, outcomes, requeue
from concurrency_safe.contrib.dramatiq.outcomes import Delivery, Neighbours
from concurrency_safe.core.errors import LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import Retry, Skip
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import DIRECT, Guard, Verbs
from concurrency_safe.locks import current_lock, current_work
from concurrency_safe.postgres.inspect import describe_work
from concurrency_safe.postgres.loop import call
from concurrency_safe.spaces import close_idle_sessions

logger = logging.getLogger("concurrency_safe")

#: The message that this thread processes, until its actor is entered.
_arriving: ContextVar[Any] = ContextVar("concurrency_safe_message", default=None)

#: The message that this thread sends, if it was told from others with its id just now.
_stamped: ContextVar[Any] = ContextVar("concurrency_safe_stamped", default=None)

#: Milliseconds that a worker with nothing to do lets pass before it looks into such a queue again.
LOOK = 200

#: The attribute of an actor, and of its function, that is guarded.
_GUARDED = "concurrency_safe_body"


async def _nothing() -> None: ...


#: The code of what Dramatiq makes of an `async def`. A decorator that runs a coroutine itself is wrapped likewise.
_BRIDGE = async_to_sync(_nothing).__code__


def _is_bridge(fn: object) -> bool:
    return getattr(fn, "__code__", None) is _BRIDGE


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
        if _guarded_body(actor) is None:
            fn, place = options.body_of(actor)
            others = (one.actor_options for one in broker.middleware if not isinstance(one, ConcurrencySafeMiddleware))
            body = _Body(broker, actor, fn, frozenset().union(*others))
            setattr(*place, body.guarded())
            setattr(actor, _GUARDED, body)

    def before_enqueue(self, broker: Any, message: Any, delay: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Tell the message from others with its id, which are sent on purpose; what is put back stays what it is."""
        body = _guarded_body(broker.actors.get(message.actor_name))
        guards = (body is not None and body.is_guarded) or "lock_key" in message.options
        if _stamped.get() is not message:  # RabbitMQ's broker begins anew when its connection is gone
            _stamped.set(message if guards and requeue.stamp(message) else None)

    def after_enqueue(self, broker: Any, message: Any, delay: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        """Leave the sender's object as it was: it may be sent again, and is another message then."""
        if _stamped.get() is message:
            del message.options[requeue.ENTRY]
        _stamped.set(None)

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
    """Give what guards `actor`; None: nothing yet."""
    body: _Body | None = getattr(actor, _GUARDED, None)
    return body


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


class _Skipped(NamedTuple):
    """The policy says *skip*; told when nothing can interrupt it."""

    policy: Skip
    conflict: LockAcquireTimeout


class _MetItself(Exception):
    """The lock is held for this very message: by a delivery that still runs, or an attempt that still unwinds."""

    def __init__(self, conflict: LockAcquireTimeout) -> None:
        super().__init__()
        self.conflict = conflict


class _LostEarly(Exception):
    """The lock was lost while the results were asked: the body must not begin."""


class _Body:
    """The function of one actor, and its guard."""

    def __init__(self, broker: Any, actor: Any, fn: Callable[..., Any], foreign: frozenset[str]) -> None:
        self._broker = broker
        self._neighbours = Neighbours(broker)
        self.actor = actor
        self._foreign = foreign
        self._fn = fn
        self.dressed: Callable[..., Any] | None = None
        other = getattr(fn, _GUARDED, None)  # the function of another actor, which is guarded, too
        is_other = isinstance(other, _Body) and other.dressed is fn  # and not a decorator around it
        guarded_inner: Callable[..., Any] | None = other.guarded_inner() if is_other else None  # type: ignore[union-attr]
        self._is_async = guarded_inner is not None or _is_bridge(fn)
        inner = fn.__wrapped__ if _is_bridge(fn) else fn  # type: ignore[attr-defined]
        self._inner: Callable[..., Any] = guarded_inner or inner
        self._options = options.declared(actor, foreign)
        self._declared = options.build(actor, self._inner, self._options)
        if self._declared is not None and not self._is_async:
            options.refuse_hidden_async(actor, fn, _is_bridge)

    @property
    def is_guarded(self) -> bool:
        """Whether it has a lock, unless a message says so by itself."""
        return self._declared is not None

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
        self.dressed = guarded
        return guarded

    def _call_directly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._declared is None:
            return self._fn(*args, **kwargs)
        return self._call(self._declared, self._inner if self._is_async else self._fn, args, kwargs, DIRECT)

    def guarded_inner(self) -> Callable[..., Any] | None:
        """Give the `async def`, guarded as by a direct call; None: it is none."""
        if not self._is_async:
            return None

        @functools.wraps(self._inner)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._declared is None:
                return await self._inner(*args, **kwargs)
            guard, template = self._declared
            return await guard.arun_as(template, self._inner, args, kwargs, DIRECT)

        return guarded

    def _process(self, message: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        declared = self._declared
        given = options.of_message(self.actor, message, self._foreign)
        if given:
            declared = options.build(self.actor, self._inner, {**self._options, **given})
        if declared is None:
            return self._fn(*args, **kwargs)
        if not self._neighbours.are_current():
            self._neighbours = Neighbours(self._broker)
        delivery = Delivery(self._neighbours, message)
        # Values and no tokens: an interrupt may come before a token is written down.
        outer_work, outer_conflicts = current_work.get(), instrumentation.conflicts.get()
        try:
            current_work.set(delivery.work)
            instrumentation.conflicts.set([])
            result = self._attempt(declared, delivery, args, kwargs)
        finally:
            try:
                delivery.show_options()  # where an interrupt kept the body from doing so
                self._calm(delivery)
            finally:
                instrumentation.conflicts.set(outer_conflicts)
                current_work.set(outer_work)
        if isinstance(result, _Skipped):
            # It is a result, since groups and pipelines end silently at a SkipMessage.
            who = message.message_id, message.actor_name
            logger.info("message %s of actor %s was skipped: %s", *who, result.conflict)
            result = result.policy.result
        delivery.has_run(result)
        return result

    def _attempt(
        self,
        declared: tuple[Guard, KeyTemplate],
        delivery: Delivery,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run the body, or end this delivery without it.

        Raises: PutBack, PutBackFailed, ConflictBudgetSpent, StoreBudgetSpent; what the body and the policy raise.
        """
        message = delivery.message
        meet = partial(_ameet if self._is_async else _meet, delivery, declared[0])
        body = self._abody(delivery) if self._is_async else self._body(delivery)
        end: Callable[[], Any]
        try:
            return self._call(declared, body, args, kwargs, Verbs(_postpone, _Skipped, meet), delivery.work)
        except _Postponed as postponed:
            end = partial(requeue.later, self._broker, message, postponed.policy, postponed.error)
        except _MetItself as met:
            why = f"it runs already, or did just now: {met.conflict}"
            end = partial(requeue.duplicate, self._broker, message, why)
        except outcomes.ResultsUnavailable as error:
            why = f"whether it has run already, the results don't say: {error}"
            end = partial(requeue.duplicate, self._broker, message, why, error)
        except _LostEarly:
            end = partial(requeue.duplicate, self._broker, message, "its lock was lost before its body began")
        except outcomes.HasRun as earlier:
            end = partial(requeue.drop, message) if earlier.told else partial(_go_on, message, earlier.result)
        except BaseException as error:
            self._calm(delivery)
            delivery.take_back(error)
            raise
        self._calm(delivery)
        return end()

    def _calm(self, delivery: Delivery) -> None:
        """Let nothing interrupt what comes now; then tell of conflicts."""
        delivery.disarm()
        waiting = instrumentation.conflicts.get()
        if waiting:
            told = instrumentation.conflicts.set(None)
            while waiting:
                instrumentation.emit(waiting.pop(0))
            instrumentation.conflicts.reset(told)

    def _call(
        self,
        declared: tuple[Guard, KeyTemplate],
        body: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
        work: str | None = None,
    ) -> Any:
        """Run `body` guarded. `work`: the message's id; None: a direct call."""
        guard, template = declared
        if not (self._is_async or guard.admits_several):
            return guard.run_as(template, body, args, kwargs, verbs)
        run = partial(guard.arun_as if self._is_async else guard.run_as, template, body, args, kwargs, verbs)
        if work is not None and guard.admits_several:
            run = partial(guard.arun_once if self._is_async else guard.run_once, work, run, _met, args, kwargs, verbs)
        return _in_loop(run) if self._is_async else run()

    def _body(self, delivery: Delivery) -> Callable[..., Any]:
        """Give the body for its message: a copy may have run already, and the next one has to know."""

        def body(*args: Any, **kwargs: Any) -> Any:
            if delivery.may_have_run:
                delivery.refuse_second_run()
                _refuse_lost()
            with _ToItself(delivery):
                result = self._fn(*args, **kwargs)
            failure = delivery.note_run(result)  # which a time limit may end: results can hang
            delivery.disarm()
            delivery.tell_unnoted(failure)
            return result

        return body

    def _abody(self, delivery: Delivery) -> Callable[..., Any]:
        """Do the same for an `async def`, whose loop must not wait for the results."""

        async def body(*args: Any, **kwargs: Any) -> Any:
            if delivery.may_have_run:
                await call(delivery.refuse_second_run)
                _refuse_lost()
            with _ToItself(delivery):
                result = await self._inner(*args, **kwargs)
            # Where it was cancelled Dramatiq has given it up, and tries again.
            if delivery.has_result and not _is_cancelled():
                delivery.tell_unnoted(await call(partial(delivery.note_run, result)))
            return result

        return body


def _meet(delivery: Delivery, guard: Guard, conflict: LockAcquireTimeout) -> None:
    """Never skip or fail for a conflict with oneself, nor when the message has run already.

    An unknown holder may be oneself, unless the broker knows better.
    """
    if delivery.may_have_run:
        delivery.refuse_second_run()
    itself = describe_work(delivery.work) in (conflict.holder or "")
    unknown = conflict.holder is None and requeue.is_redelivered(delivery.message) is not False
    if itself or (unknown and not isinstance(guard.policy, Retry)):
        raise _MetItself(conflict)


async def _ameet(delivery: Delivery, guard: Guard, conflict: LockAcquireTimeout) -> None:
    """Do the same where the loop must not wait for the results."""
    meet = partial(_meet, delivery, guard, conflict)
    await call(meet) if delivery.may_have_run else meet()


def _refuse_lost() -> None:
    held = current_lock()
    if held is None or held.is_lost:
        raise _LostEarly


class _ToItself:
    """Leaves the body to itself: it neither sees our options, nor do its own conflicts wait."""

    __slots__ = ("_delivery", "_events")

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    def __enter__(self) -> None:
        self._events = instrumentation.conflicts.set(None)
        self._delivery.hide_options()

    def __exit__(self, *_: object) -> None:
        self._delivery.show_options()
        instrumentation.conflicts.reset(self._events)


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


def _is_cancelled() -> bool:
    """Say whether the running task was cancelled, and goes on nevertheless. Python 3.10 can't tell."""
    task = asyncio.current_task()
    return task is not None and hasattr(task, "cancelling") and task.cancelling() > 0


def _postpone(policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> Any:
    raise _Postponed(policy, error)


def _go_on(message: Any, result: Any) -> Any:
    logger.info("message %s has run already; its result goes on", message.message_id)
    return result


def _met(conflict: LockAcquireTimeout) -> Any:
    raise _MetItself(conflict)
