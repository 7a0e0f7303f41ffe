"""The lock options of an actor, and of a message to it: checked, and made into a `Guard`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from dramatiq import GenericActor
from dramatiq.middleware import MiddlewareError

from concurrency_safe.core.adapter_options import (
    MISTAKEN,
    OPTIONS,
    looks_like_ours,
    refuse_mistaken,
    refuse_without_key,
)
from concurrency_safe.core.errors import ConfigurationError, KeyTemplateError
from concurrency_safe.core.parameters import is_async
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import Guard

#: What an actor may declare. The mistaken names are among them, so that they reach us, who know the right ones.
DECLARABLE = frozenset(OPTIONS) | frozenset(MISTAKEN)


class ActorOptionError(ConfigurationError, MiddlewareError):
    """A lock option of an actor is not usable. Any error but a MiddlewareError would leave the actor unguarded."""


class ActorKeyError(KeyTemplateError, MiddlewareError):
    """The key of an actor is not usable. See `ActorOptionError`."""


def body_of(actor: Any) -> tuple[Callable[..., Any], tuple[Any, str]]:
    """Give the function of an actor, and where it is kept: a class-based one is also called by its instance."""
    if isinstance(actor.fn, GenericActor):
        return actor.fn.perform, (actor.fn, "perform")
    return actor.fn, (actor, "fn")


def declared(actor: Any, foreign: frozenset[str]) -> dict[str, Any]:
    """Give the lock options that `actor` declares. `foreign`: names that belong to another middleware.

    Raises: ActorOptionError.
    """
    who = f"actor {actor.actor_name}"
    try:
        refuse_mistaken(who, actor.options.keys() - foreign)
        if actor.options.get("lock_key") is None:
            refuse_without_key(who, actor.options)
    except ConfigurationError as error:
        raise ActorOptionError(str(error)) from None
    return {name: actor.options[name] for name in OPTIONS if name in actor.options}


def of_message(actor: Any, message: Any, foreign: frozenset[str]) -> dict[str, Any]:
    """Give the lock options that a message to `actor` overrides. They come out of JSON: a tuple is a list there.

    Others may have options of their own in a message, undeclared; but not by the names that are mistaken for ours.

    Raises: ActorOptionError.
    """
    given = {name: value for name, value in message.options.items() if _is_meant_for_us(name) and name not in foreign}
    if not given:
        return given
    who = f"a message to actor {actor.actor_name}"
    try:
        refuse_mistaken(who, given)
        if "lock_key" not in given and actor.options.get("lock_key") is None:
            refuse_without_key(who, given)
    except ConfigurationError as error:
        raise ActorOptionError(str(error)) from None
    if "lock_key" in given and given["lock_key"] is None:
        raise ActorOptionError(f"{who}: lock_key=None would run it unguarded; leave the option out")
    slots, known = given.get("lock_slots"), actor.options.get("lock_slots", 1)
    if slots is not None and slots != known and "lock_key" not in given:
        raise ActorOptionError(
            f"{who}: lock_slots={slots!r}, but the key of its other messages has {known}, and a key has one number of "
            "slots everywhere; give the message a lock_key of its own, too"
        )
    if isinstance(given.get("lock_key"), list):
        given["lock_key"] = tuple(given["lock_key"])
    return given


@lru_cache(maxsize=256)
def _is_meant_for_us(name: str) -> bool:
    return looks_like_ours(name) or name.lower() in MISTAKEN


def refuse_hidden_async(actor: Any, fn: Any, is_bridge: Callable[[object], bool]) -> None:
    """Refuse a function that Dramatiq runs in its event loop, or not at all, where that can't be seen to its end.

    The lock would be released while the coroutine goes on.

    Raises: ActorOptionError.
    """
    who = f"actor {actor.actor_name}"
    if is_async(fn):
        raise ActorOptionError(
            f"{who}: Dramatiq never awaits an `async def perform`, nor an `async def __call__` of an object; make it a "
            "plain method, or the actor an `async def` function"
        )
    inner = fn
    while (inner := getattr(inner, "__wrapped__", None)) is not None:
        if is_bridge(inner):
            raise ActorOptionError(
                f"{who}: a function is around what Dramatiq made of its `async def`, so its lock would not last until "
                "that has ended; decorate the `async def` itself, or, where another middleware does it, put "
                "ConcurrencySafeMiddleware before that one"
            )


def build(actor: Any, body: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Guard, KeyTemplate] | None:
    """Make the guard of `actor`, and the template of its key; None: it is not guarded.

    Raises: ActorOptionError, ActorKeyError: with the actor's name before what is wrong.
    """
    key = options.get("lock_key")
    who = f"actor {actor.actor_name}"
    if key is None:
        return None
    try:
        guard = Guard(
            key,
            timeout=options.get("lock_timeout", 0),
            shared=options.get("lock_shared", False),
            slots=options.get("lock_slots", 1),
            on_conflict=options.get("on_conflict", "retry"),
        )
        return guard, guard.template(body, actor.actor_name)
    except KeyTemplateError as error:
        raise ActorKeyError(f"{who}: {error}", error.key) from None
    except ConfigurationError as error:
        raise ActorOptionError(f"{who}: {error}", error.key) from None
