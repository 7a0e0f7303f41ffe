"""`ConcurrencySafeTask`: the body of a task runs while its lock is held, and only then.

The guard stands in `Task.__call__`, which Celery's tracer honours: inside its handling of Retry, Ignore and Reject, and
outside `autoretry_for`, which would take a conflict for a failure of the body.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Task, signals
from celery.exceptions import Ignore

from concurrency_safe.contrib.celery import options, requeue
from concurrency_safe.core.errors import ConcurrencySafeError, LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import ConflictPolicy, Retry, Skip
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import DIRECT, Guard, Verbs
from concurrency_safe.locks import HeldLock, current_lock, current_work
from concurrency_safe.postgres.inspect import describe_work
from concurrency_safe.spaces import close_idle_sessions

try:
    # Keeps delay_on_commit; importable without settings, and absent before Celery 5.4.
    from celery.contrib.django.task import DjangoTask
except ImportError:  # pragma: no cover - Celery 5.3
    _Base: Any = Task
else:
    _Base = DjangoTask

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("concurrency_safe")

_ENTERED = "concurrency_safe_entered"


class ConcurrencySafeMixin:
    """Guards a task by its `lock_key`; mix it in before your own base class.

    Attributes (options of `@app.task`):
        lock_key: A template over the body's arguments, a tuple of parts, a callable that gets the arguments (never
            `self`), True (the task's name and all arguments), or None: not guarded.
        lock_timeout: Seconds that the worker waits before the policy decides; 0: it tries once; None: for ever.
        on_conflict: "retry" (back to the queue, with a budget of its own), "skip", "raise", a policy value, or a
            callable that gets the arguments and whose return value is the task's result.
        lock_shared: True: at once with other shared holders of the key, never with one who holds it alone.
        lock_slots: How many may hold the key at once; the same number wherever the key is used.
    """

    lock_key: Any = None
    lock_timeout: float | None = 0
    lock_shared: bool = False
    lock_slots: int = 1
    on_conflict: str | ConflictPolicy | Callable[..., Any] = "retry"

    #: The guard and its key's template; None: not guarded; absent: not looked at yet.
    _guard: tuple[Guard, KeyTemplate] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check the options: Celery registers a task after this, so an invalid one can never be used.

        Raises: ConfigurationError, KeyTemplateError.
        """
        super().__init__(*args, **kwargs)
        if options.build(self, ConcurrencySafeMixin) is not None:
            _warn_of_bypass(self)

    @property
    def lock(self) -> HeldLock | None:
        """The lock that the running body holds."""
        return current_lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body guarded."""
        task: Any = self
        request = task.request
        guarded = guard_of(self)
        if guarded is None:
            return super().__call__(*args, **kwargs) if request.called_directly else task.run(*args, **kwargs)  # type: ignore[misc]  # Task's
        guard, template = guarded
        if request.called_directly or getattr(request, _ENTERED, False):
            # Also a body that calls its own task: its request is the outer one's, which must not go back to the queue.
            return guard.run_as(template, super().__call__, args, kwargs, DIRECT)  # type: ignore[misc]  # Task's
        setattr(request, _ENTERED, True)
        verbs = DIRECT if request.is_eager else Verbs(self._retry, self._skip, self._defer_copy)
        token = current_work.set(request.id)
        try:
            if verbs is DIRECT or not guard.admits_several:
                return guard.run_as(template, self._run_once, args, kwargs, verbs)
            run = partial(guard.run_as, template, self._run_once, args, kwargs, verbs)
            return guard.run_once(request.id, run, lambda _: requeue.duplicate(task), args, kwargs, verbs)
        finally:
            current_work.reset(token)

    def _run_once(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body, unless this is a copy of a task that has run meanwhile, or that lost its lock in that time."""
        task: Any = self
        if requeue.is_copy(task):
            _end_second_copy(task, requeue.SETTLING)
            held = current_lock()
            if held is None or held.is_lost:
                logger.info("task %s[%s]: its lock was lost before its body began", task.name, task.request.id)
                requeue.duplicate(task)
        return task.run(*args, **kwargs)

    def _retry(self, policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> Any:
        requeue.later(self, policy, error)

    def _skip(self, policy: Skip, conflict: LockAcquireTimeout) -> Any:
        task: Any = self
        logger.info("task %s[%s] was skipped: %s", task.name, task.request.id, conflict)
        try:  # always: the pool's process is not told whether anybody asked the worker for events
            task.send_event("task-skipped", retry=False, lock_key=conflict.key, holder=conflict.holder)
        except Exception:
            logger.warning(
                "task %s[%s]: the event task-skipped was not sent", task.name, task.request.id, exc_info=True
            )
        return policy.result

    def _defer_copy(self, conflict: LockAcquireTimeout) -> None:
        """Never skip or fail for a conflict with oneself: a redelivered copy, or an attempt that still unwinds.

        Whoever had let go when the holder was read may have been just that.
        """
        task: Any = self
        if requeue.is_copy(task):
            _end_second_copy(task)
        if conflict.holder is None or describe_work(task.request.id) in conflict.holder:
            requeue.duplicate(task)


class ConcurrencySafeTask(ConcurrencySafeMixin, _Base):  # type: ignore[misc]  # which base, is known at import only
    """A task guarded by its name and all its arguments, or by its own `lock_key`.

    As an app's base (`Celery(task_cls=...)`, `app.Task`) it guards only tasks that have a `lock_key` of their own.
    """

    abstract = True
    lock_key: Any = True


def guard_of(task: Any) -> tuple[Guard, KeyTemplate] | None:
    """Give the guard of `task`, None when it has none; made once Celery has bound the task, so annotations count.

    Not in `__init__` alone, which a class-based task may have of its own.

    Raises: ConfigurationError, KeyTemplateError.
    """
    try:
        guarded: tuple[Guard, KeyTemplate] | None = task._guard  # noqa: SLF001 - ours
    except AttributeError:
        guarded = options.build(task, ConcurrencySafeMixin)
        if guarded is not None:
            # An ordinary conflict is one line in the worker's log, without a traceback.
            throws = getattr(task, "throws", None) or ()
            task.throws = (*(throws if isinstance(throws, tuple) else (throws,)), LockAcquireTimeout)
        task._guard = guarded  # noqa: SLF001 - see above
    return guarded


def _end_second_copy(task: Any, patience: float = 0.0) -> None:
    """End the run of a copy whose task has run already: it is neither run again, nor skipped, nor failed.

    `patience`: seconds that its state may take to arrive.

    Raises: celery.exceptions.Ignore.
    """
    try:
        settled = requeue.is_settled(task, patience)
    except Exception:
        logger.warning(
            "task %s[%s]: whether it has run already can't be read now", task.name, task.request.id, exc_info=True
        )
        requeue.duplicate(task)
    if settled:
        logger.info("task %s[%s] has run already; this copy of it ends", task.name, task.request.id)
        raise Ignore


def _warn_of_bypass(task: Any) -> None:
    first = next(cls for cls in type(task).__mro__ if "__call__" in vars(cls))
    if first is not ConcurrencySafeMixin:
        logger.warning(
            "task %s: %s.__call__ comes before the guard's; unless it calls super().__call__, the body runs unguarded",
            options.task_name(task),
            first.__qualname__,
        )


@signals.worker_init.connect
def _refuse_mistakes(sender: Any = None, **_: Any) -> None:
    """Stop a worker that has a task with wrong lock options, or with any and a base that knows nothing of them."""
    app = getattr(sender, "app", None)
    for task in app.tasks.values() if app is not None else ():
        wrong = mistake_of(task)
        if wrong is not None:
            # SystemExit, since Celery logs any other exception of a receiver, and goes on.
            raise SystemExit(wrong)


def mistake_of(task: Any) -> str | None:
    """Say what is wrong with the lock options of `task`, which its app has bound; None: nothing."""
    if isinstance(task, ConcurrencySafeMixin):
        try:
            guard_of(task)
        except ConcurrencySafeError as error:
            return str(error)
        return None
    useless = options.unguarded_options(task)
    if not useless:
        return None
    return (
        f"task {task.name}: {', '.join(useless)} without base=ConcurrencySafeTask guards nothing; "
        "add the base, or remove the option"
    )


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def _close_sessions(**_: Any) -> None:
    close_idle_sessions()
