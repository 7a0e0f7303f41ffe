"""Has this message run already? Its stored result tells; without results nobody knows.

A queue delivers a message again whose worker fell silent, or died. Where the body has run, what is left may be to tell
those that go on from it: the next of a pipeline, the group, `on_success`. That it was done is noted beside the result.
"""

from __future__ import annotations

import logging
import threading
import time
from contextvars import ContextVar
from typing import Any

from dramatiq.middleware import TimeLimit
from dramatiq.results import ResultFailure, ResultMissing, Results

#: Seconds that a copy which has the lock waits for what a message that may just have ended still has to say, since
#: Dramatiq stores its result, and what follows, after the lock's release; between two looks.
SETTLING, _LOOK = 1.0, 0.02

#: An attribute of a message whose body has run, in this delivery or an earlier one.
_HAS_RUN = "concurrency_safe_has_run"

#: Whether a middleware failed to do its part after this thread's message, as one does while the broker is away.
_hook_failed: ContextVar[bool] = ContextVar("concurrency_safe_hook_failed", default=False)

_MISSING = object()
_never = threading.Event()


class HasRun(Exception):
    """The message has succeeded in an earlier delivery.

    Attributes:
        result: What was stored then.
        told: Those that go on from it know it, too.
    """

    def __init__(self, result: Any, told: bool) -> None:  # noqa: FBT001 - an exception's arguments
        super().__init__()
        self.result = result
        self.told = told


def refuse_second_run(broker: Any, message: Any, *, settling: bool) -> None:
    """End a copy of a message whose result there is.

    `settling`: the copy has the lock, so whoever had it may have ended just now: wait for its result.

    Raises: HasRun.
    """
    results = _results(broker, message)
    if results is None:
        return
    until = time.monotonic() + _patience(broker, message)
    result = _find(results.backend, message, until if settling else 0.0)
    if result is not _MISSING:
        told = not _goes_on(broker, message) or _find(results.backend, _note(message), until) is not _MISSING
        raise HasRun(result, told)


def has_run(message: Any) -> None:
    """Remember that the body of `message` has run, until it is acknowledged."""
    setattr(message, _HAS_RUN, True)
    _hook_failed.set(False)


def watch_hooks(broker: Any) -> None:
    """Learn of hooks that fail: Dramatiq tells its log, and nobody else."""
    broker.logger.removeFilter(_learn)
    broker.logger.addFilter(_learn)


def _learn(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple) and "after_process_message" in record.args:
        _hook_failed.set(True)
    return True


def note_told(broker: Any, message: Any) -> None:
    """Note that those that go on from `message` were told, just before it is acknowledged; unless that failed."""
    if hasattr(message, _HAS_RUN) and not _hook_failed.get() and _goes_on(broker, message):
        results = _results(broker, message)
        if results is not None:
            ttl = _option(broker, message, "result_ttl", results.result_ttl)
            results.backend.store_result(_note(message), "told", ttl)


def _note(message: Any) -> Any:
    """Give what the note is stored for: a message that there never is."""
    return message.copy(message_id=f"{message.message_id}.told")


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
