"""`Guard`: a key template, lock options and a conflict policy, with one verb: run.

This is the one place where a conflict policy is matched. The decorator, a view, a task, an actor and a cron command are
five ways to build the call; what *retry* and *skip* mean to a framework, its adapter says by `Verbs`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import update_wrapper
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from concurrency_safe.core.errors import ConfigurationError, LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.options import UNSET, LockOptions
from concurrency_safe.core.parameters import is_async, refuse_unfit
from concurrency_safe.core.policies import Call, ConflictPolicy, Raise, Retry, Skip, resolve_policy
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.locks import Lock

P = ParamSpec("P")
R = TypeVar("R")

_MISSING: Any = object()

#: How many functions a guard knows at a time.
TEMPLATES = 64

#: What contextlib makes of a generator function.
_MANAGERS = (contextlib._GeneratorContextManager, contextlib._AsyncGeneratorContextManager)

#: What may be a body that has not run yet.
_UNRUN = (CoroutineType, GeneratorType, AsyncGeneratorType, *_MANAGERS)

_FORMS = (
    '@concurrency_safe(key="stock:{sku}"), @concurrency_safe(key=("stock", "{sku}")), '
    "@concurrency_safe(key=lambda request, sku: ...) or @concurrency_safe(key=True) for the function's name and all "
    "its arguments"
)


class Verbs(NamedTuple):
    """What a framework does where a policy leaves that to it; each returns the call's result, or raises.

    `retry` also gets a `LockUnavailable`: a queue tries again when the lock store is back. `meet` is told of each
    conflict before the policy is asked; it raises to end the call in the framework's own way. An `async def` may
    have one that is awaited.
    """

    retry: Callable[[Retry, LockAcquireTimeout | LockUnavailable], Any]
    skip: Callable[[Skip, LockAcquireTimeout], Any]
    meet: Callable[[LockAcquireTimeout], Any] = lambda _conflict: None


def _cannot_retry(policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> Any:  # noqa: ARG001 - see Verbs
    raise error


def _skip(policy: Skip, conflict: LockAcquireTimeout) -> Any:  # noqa: ARG001 - see Verbs
    return policy.result


#: For a call that no queue stands behind.
DIRECT = Verbs(retry=_cannot_retry, skip=_skip)


@dataclass(frozen=True)
class Guard:
    """How a call is guarded: which key, with which options, and what happens on a conflict.

    `key` is a template ("stock:{sku}"), a tuple of parts, a callable that gets the call's arguments, or True (the
    function's name and all its arguments). `on_conflict`: "raise", "skip", a callable that gets the call's arguments
    and whose result is the call's, or a policy value. The other options are those of `lock()`.

    Raises: ConfigurationError: an option is bad.
    """

    key: Any
    _: KW_ONLY
    timeout: Any = UNSET
    on_conflict: Any = "raise"
    shared: bool = False
    slots: int = 1
    scope: str = "auto"
    using: str | None = None
    backend: object | None = None
    max_waiters: int | None = None
    options: LockOptions = field(init=False, repr=False, compare=False)
    policy: ConflictPolicy = field(init=False, repr=False, compare=False)
    _templates: dict[Any, KeyTemplate] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the options once; past this line nobody does."""
        options = LockOptions(
            timeout=self.timeout,
            shared=self.shared,
            slots=self.slots,
            scope=self.scope,
            using=self.using,
            backend=self.backend,
            max_waiters=self.max_waiters,
        )
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "policy", resolve_policy(self.on_conflict))

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Decorate `fn`: every call of it is guarded.

        Raises: ConfigurationError: `fn` can't be guarded so. KeyTemplateError: the key names what `fn` doesn't take.
        """
        if isinstance(self.policy, Retry):
            raise ConfigurationError(
                f"{_name(fn)}: on_conflict='retry' needs a queue to go back to; use it on a task "
                "(concurrency_safe.contrib.celery, concurrency_safe.contrib.dramatiq), or 'raise', 'skip' or a "
                "callable here"
            )
        template = self.template(fn)
        if inspect.iscoroutinefunction(fn):

            async def aguarded(*args: P.args, **kwargs: P.kwargs) -> Any:
                return await self.arun_as(template, fn, args, kwargs, DIRECT)

            return cast("Callable[P, R]", self._dressed(aguarded, fn))  # R is an awaitable here

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast("R", self.run_as(template, fn, args, kwargs, DIRECT))

        return self._dressed(guarded, fn)

    def _dressed(self, guarded: Callable[P, Any], fn: Callable[P, Any]) -> Callable[P, Any]:
        update_wrapper(guarded, fn)
        guarded.guard = self  # type: ignore[attr-defined]  # a function's own attribute
        return guarded

    def run(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `fn` guarded, once.

        Raises: LockAcquireTimeout: by the policy Raise (and Retry: nothing stands behind this call). LockUnavailable,
            LockInTransaction, KeyTemplateError: `fn` did not run. LockLost: it ran, and the lock went away meanwhile.
        """
        if inspect.iscoroutinefunction(fn):
            raise ConfigurationError(
                f"{_name(fn)} is `async def`, whose body would run after the lock's release; `await guard.arun(...)`"
            )
        return cast("R", self.run_as(self._template(fn), fn, args, kwargs, DIRECT))

    async def arun(self, fn: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call and await `fn` guarded, once. See `run`."""
        return cast("R", await self.arun_as(self._template(fn), fn, args, kwargs, DIRECT))

    def lock(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Lock:
        """Give the lock that the call `fn(*args, **kwargs)` would take.

        Raises: KeyTemplateError, ConfigurationError; TypeError: the arguments don't fit.
        """
        key = self._template(fn).render(args, kwargs)
        return Lock((key,), self.options, (lock_key(key),))

    def _template(self, fn: Callable[..., Any]) -> KeyTemplate:
        """Give the template for `fn`, which `run` gets anew at each call.

        Remembered here, not by the key: keys that are equal, as 1 and True, have different texts.
        """
        template = self._templates.get(fn)
        if template is None:
            if len(self._templates) >= TEMPLATES:
                self._templates.clear()
            template = self._templates[fn] = self.template(fn)
        return template

    def template(self, fn: Callable[..., Any], name: str | None = None) -> KeyTemplate:
        """Give the key's template for `fn`, which is checked, as are the callables that get its arguments.

        `name`: what stands for `fn` in the key True, see `KeyTemplate`.

        Raises: ConfigurationError, KeyTemplateError.
        """
        refuse_unguardable(fn)
        template = KeyTemplate(self.key, fn, name=name)
        if isinstance(self.policy, Call):
            handler = self.policy.handler
            refuse_unfit(f"on_conflict={handler!r}", handler, fn, before=int(self.policy.pass_conflict))
            if is_async(handler) and not is_async(fn):
                raise ConfigurationError(
                    f"on_conflict={handler!r} is `async def`, but {_name(fn)} is not, so nobody would await it"
                )
        return template

    def run_as(
        self,
        template: KeyTemplate,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
    ) -> Any:
        """Call `fn` guarded, for an adapter: `template` is the key's for `fn`, `verbs` what the framework does."""
        lock = Lock((template.render(args, kwargs),), self.options)
        try:
            with lock:
                result = fn(*args, **kwargs)
                if type(result) in _UNRUN:
                    _refuse_unrun(result, fn)
                return result
        except (LockAcquireTimeout, LockUnavailable) as error:
            # By identity: a conflict of another lock, inside the body, is the body's own error.
            if error is not lock.failure:
                raise
            if isinstance(error, LockAcquireTimeout):
                verbs.meet(error)
            return self._resolve(error, args, kwargs, verbs)

    def run_once(
        self,
        work: str,
        run: Callable[[], Any],
        met: Callable[[LockAcquireTimeout], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
    ) -> Any:
        """Call `run`, which calls `run_as`, never two of them for one `work`: for a guard that admits several.

        A queue delivers a message twice at times: two copies of it must not be two holders. `work`: the message's id;
        `met`: what a copy does that meets the other.
        """
        lock = self._lock_of_work(work)
        try:
            with lock:
                return run()
        except (LockAcquireTimeout, LockUnavailable) as error:
            if error is not lock.failure:
                raise
            return met(error) if isinstance(error, LockAcquireTimeout) else self._resolve(error, args, kwargs, verbs)

    @property
    def admits_several(self) -> bool:
        """Whether the key may have several holders at once."""
        return self.shared or self.slots > 1

    def _lock_of_work(self, work: str) -> Lock:
        """Give the lock that keeps `work` from meeting itself, where the guard's own doesn't."""
        options = replace(self.options, timeout=0, shared=False, slots=1, max_waiters=None)
        return Lock((("concurrency_safe", work),), options)

    async def arun_as(
        self,
        template: KeyTemplate,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
    ) -> Any:
        """Call and await `fn` guarded, for an adapter. A conflict's handler may be `async def`, too."""
        lock = Lock((template.render(args, kwargs),), self.options)
        try:
            async with lock:
                return await fn(*args, **kwargs)
        except (LockAcquireTimeout, LockUnavailable) as error:
            if error is not lock.failure:  # see run_as
                raise
            if isinstance(error, LockAcquireTimeout):
                await _awaited(verbs.meet(error))
            return await _awaited(self._resolve(error, args, kwargs, verbs))

    async def arun_once(
        self,
        work: str,
        run: Callable[[], Awaitable[Any]],
        met: Callable[[LockAcquireTimeout], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
    ) -> Any:
        """Call `run`, which calls `arun_as`; never two of them for one `work`. See `run_once`."""
        lock = self._lock_of_work(work)
        try:
            async with lock:
                return await run()
        except (LockAcquireTimeout, LockUnavailable) as error:
            if error is not lock.failure:
                raise
            return met(error) if isinstance(error, LockAcquireTimeout) else self._resolve(error, args, kwargs, verbs)

    def _resolve(
        self,
        error: LockAcquireTimeout | LockUnavailable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        verbs: Verbs,
    ) -> Any:
        """Do what the policy says about a lock that was not acquired."""
        policy = self.policy
        if isinstance(policy, Retry):
            return verbs.retry(policy, error)
        if isinstance(error, LockUnavailable) or isinstance(policy, Raise):
            raise error
        if isinstance(policy, Skip):
            return verbs.skip(policy, error)
        return policy.handler(error, *args, **kwargs) if policy.pass_conflict else policy.handler(*args, **kwargs)


def concurrency_safe(  # noqa: PLR0913 - one keyword an option, as `lock()` has them
    positional_key: Any = _MISSING,
    /,
    *,
    key: Any = _MISSING,
    timeout: Any = UNSET,
    on_conflict: Any = "raise",
    shared: bool = False,
    slots: int = 1,
    scope: str = "auto",
    using: str | None = None,
    backend: object | None = None,
    max_waiters: int | None = None,
) -> Guard:
    """Let no two calls with the same key run at once, in any process on the database.

        @concurrency_safe(key="withdraw:user:{user_id}")
        def withdraw(user_id, amount): ...

    `key`: see `Guard`; its fields are the function's arguments, checked now. `timeout`: seconds to wait; 0 tries once;
    None waits for ever; default: the setting TIMEOUT. `on_conflict`: see `Guard`. The others are those of `lock()`.

    Raises: ConfigurationError, KeyTemplateError: at decoration. By the call: what `Guard.run` raises.
    """
    if positional_key is not _MISSING and key is not _MISSING:
        raise ConfigurationError("@concurrency_safe got two keys, one by position and one by name; give one")
    bare = callable(positional_key) and getattr(positional_key, "__name__", "") != "<lambda>"
    if bare or (positional_key is _MISSING and key is _MISSING):
        raise ConfigurationError(f"@concurrency_safe needs a key: {_FORMS}")
    return Guard(
        key if positional_key is _MISSING else positional_key,
        timeout=timeout,
        on_conflict=on_conflict,
        shared=shared,
        slots=slots,
        scope=scope,
        using=using,
        backend=backend,
        max_waiters=max_waiters,
    )


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def _name(fn: object) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def refuse_unguardable(fn: Any) -> None:
    """Refuse what returns before its body has run: the lock would be released before the work.

    Raises: ConfigurationError.
    """
    if isinstance(fn, (staticmethod, classmethod)):
        kind = type(fn).__name__
        raise ConfigurationError(f"{_name(fn)} is a {kind}: put @{kind} above the guard, not below it")
    if inspect.isclass(fn) or not callable(fn):
        raise ConfigurationError(
            f"{_name(fn)} is not a function; guard its methods, in a class-based view by method_decorator"
        )
    for body in (fn, type(fn).__call__):
        if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
            raise _generates(fn)


def _generates(fn: object) -> ConfigurationError:
    return ConfigurationError(
        f"{_name(fn)} is a generator function: its body runs after the lock's release; "
        "use `with lock(...)` inside it, or guard the function that consumes it"
    )


def _refuse_unrun(result: Any, fn: Any) -> None:
    """Refuse a result that is the body of `fn`, still to be run: a coroutine, a generator, or a manager made of one.

    A decorator below the guard may have hidden it, or may have consumed it; only the result tells.

    Raises: ConfigurationError.
    """
    if inspect.iscoroutine(result):
        result.close()
        raise ConfigurationError(
            f"{_name(fn)} returned a coroutine, which would run after the lock's release; "
            "make it `async def`, so that it is awaited while the lock is held"
        )
    if type(result) in _MANAGERS:
        result = result.gen
    code = getattr(result, "gi_code", None) or getattr(result, "ag_code", None)
    if code is not None and code is getattr(inspect.unwrap(fn), "__code__", None):
        raise _generates(fn)
