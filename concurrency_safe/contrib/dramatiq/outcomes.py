"""Has this message run already? Notes beside the results tell; without results nobody knows.

A queue delivers a message again whose worker fell silent, or died. That the body has run, and with which result, is
noted while the lock is still held, so whoever gets the lock knows; Dramatiq stores the result later. What is left may
be to tell those that go on from it: the next of a pipeline, the group, `on_success`. That it was done is noted, too.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from dramatiq.middleware import Callbacks, GroupCallbacks, Pipelines, TimeLimit
from dramatiq.results import ResultFailure, ResultMissing, Results

from concurrency_safe.contrib.dramatiq import requeue

logger = logging.getLogger("concurrency_safe")

#: Seconds that a copy waits for what an earlier delivery may just be doing: telling those that go on from it; between
#: two looks.
SETTLING, _LOOK = 1.0, 0.02

#: What is noted: the body's result; that those who go on from the message were told.
_RAN, _TOLD = "ran", "told"

#: Attributes of a message: its body has run, in this delivery or an earlier one; this delivery has noted so.
_HAS_RUN, _NOTED = "concurrency_safe_has_run", "concurrency_safe_noted"

#: Whether a middleware failed to do its part after this thread's message, as one does while the broker is away.
_hook_failed: ContextVar[bool] = ContextVar("concurrency_safe_hook_failed", default=False)

#: An attribute of a hook that is watched.
_WATCHED = "concurrency_safe_watched"

#: Of which the ids of notes are made.
_NOTES = uuid.UUID("7d1b4b3a-9f0e-4f43-8d0d-5f6b9c1f7c11")

_MISSING = object()
_never = threading.Event()


class ResultsUnavailable(Exception):
    """The results can't be asked whether a copy of a message is one too many."""


class HasRun(Exception):
    """The message has succeeded in an earlier delivery.

    Attributes:
        result: What it gave then.
        told: Those that go on from it know it, too.
    """

    def __init__(self, result: Any, told: bool) -> None:  # noqa: FBT001 - an exception's arguments
        super().__init__()
        self.result = result
        self.told = told


def refuse_second_run(broker: Any, message: Any, *, certain: bool) -> None:
    """End a copy of a message that has run. `certain`: it is a copy; else it may be one, and runs when nobody knows.

    Raises: HasRun, ResultsUnavailable.
    """
    results = _results(broker, message)
    if results is None:
        return
    try:
        result = _find(results.backend, _note(message, _RAN), 0.0)
        if result is _MISSING:
            return
        until = time.monotonic() + _patience(broker, message)
        # Whoever waits for the result is one more that goes on from the message.
        awaited = [message, _note(message, _TOLD)] if _goes_on(broker, message) else [message]
        told = all(_find(results.backend, one, until) is not _MISSING for one in awaited)
    except Exception as error:
        if not certain:
            return
        raise ResultsUnavailable(f"{type(error).__name__}: {error}") from error
    raise HasRun(result, told)


def has_results(broker: Any, message: Any) -> bool:
    """Say whether the result of `message` is stored at all."""
    return _results(broker, message) is not None


def note_run(broker: Any, message: Any, result: Any) -> Exception | None:
    """Note that the body of `message` has run; its lock is held.

    Returns: why it could not be noted; then it is as without a guard, and the message may run a second time.
    """
    results = _results(broker, message)
    if results is not None:
        setattr(message, _NOTED, True)
        try:
            results.backend.store_result(_note(message, _RAN), result, _ttl(broker, message, results))
        except Exception as error:  # noqa: BLE001 - the body has run, and nothing may make that a failure
            return error
    return None


def tell_unnoted(message: Any, error: Exception | None) -> None:
    """Say so to the log."""
    if error is not None:
        logger.warning("that message %s has run could not be noted: %s", message.message_id, error)


def take_back(broker: Any, message: Any, error: BaseException) -> None:
    """Take that note back: the body has run, but not to a good end, since `error` came behind it (a lost lock)."""
    results = _results(broker, message)
    if results is not None and hasattr(message, _NOTED):
        try:
            results.backend.store_exception(_note(message, _RAN), error, _ttl(broker, message, results))
        except Exception as failure:  # noqa: BLE001 - `error` is what is to be told
            logger.warning("that message %s has failed could not be noted: %s", message.message_id, failure)


def has_run(broker: Any, message: Any, result: Any) -> None:
    """Remember that `message` has its result, until it is acknowledged; note it where the body did not (a skip)."""
    if not hasattr(message, _NOTED):
        tell_unnoted(message, note_run(broker, message, result))
    setattr(message, _HAS_RUN, True)
    _hook_failed.set(False)


def watch_hooks(broker: Any) -> None:
    """Learn of hooks that fail to tell those that go on from a message: Dramatiq tells its log, and nobody else."""
    for one in broker.middleware:
        if isinstance(one, (Callbacks, GroupCallbacks, Pipelines)):
            told: Any = one
            if not hasattr(told.after_process_message, _WATCHED):
                told.after_process_message = _watched(told.after_process_message)


def _watched(hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def watched(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except BaseException:
            _hook_failed.set(True)
            raise

    setattr(watched, _WATCHED, True)
    return watched


def note_told(broker: Any, message: Any) -> None:
    """Note that those that go on from `message` were told, just before it is acknowledged; unless that failed."""
    if hasattr(message, _HAS_RUN) and not _hook_failed.get() and _goes_on(broker, message):
        results = _results(broker, message)
        if results is not None:
            results.backend.store_result(_note(message, _TOLD), None, _ttl(broker, message, results))


def _note(message: Any, what: str) -> Any:
    """Give what a note is stored for: a message that there never is. Its id is a UUID, as backends may want it."""
    return message.copy(message_id=str(uuid.uuid5(_NOTES, f"{message.message_id} {requeue.entry(message)} {what}")))


def _goes_on(broker: Any, message: Any) -> bool:
    """Say whether anything goes on from `message`."""
    return any(
        _option(broker, message, name, None) for name in ("pipe_target", "group_completion_callbacks", "on_success")
    )


def _find(backend: Any, message: Any, until: float) -> Any:
    """Give the result of `message`, for which there is time `until` then; _MISSING: there is none."""
    while True:
        try:
            return backend.get_result(message, block=False)
        except ResultFailure:
            return _MISSING
        except ResultMissing:
            if time.monotonic() >= until:
                return _MISSING
            _never.wait(_LOOK)


def _results(broker: Any, message: Any) -> Any:
    """Give the middleware that stores the result of `message`; None: nobody does."""
    for one in broker.middleware:
        if isinstance(one, Results):
            return one if _option(broker, message, "store_results", one.store_results) else None
    return None


def _ttl(broker: Any, message: Any, results: Any) -> Any:
    return _option(broker, message, "result_ttl", results.result_ttl)


def _patience(broker: Any, message: Any) -> float:
    """Give the seconds that settling may take: the body has to have some of its time, too."""
    limits: list[int] = [
        _option(broker, message, "time_limit", one.time_limit)
        for one in broker.middleware
        if isinstance(one, TimeLimit)
    ]
    return min([SETTLING, *(limit / 2000 for limit in limits if limit)])


def _option(broker: Any, message: Any, name: str, default: Any) -> Any:
    options = {**broker.get_actor(message.actor_name).options, **message.options}
    return options.get(name, default)
