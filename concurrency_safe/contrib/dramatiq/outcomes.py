"""Has this message run already? Notes beside the results tell; without results nobody knows.

A queue delivers a message again whose worker fell silent, or died. That the body has run, and with which result, is
noted while the lock is still held, so whoever gets the lock knows; Dramatiq stores the result later. What is left may
be to tell those that go on from it: the next of a pipeline, the group, `on_success`. That it was done is noted, too.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from dramatiq.middleware import Callbacks, GroupCallbacks, Pipelines, ShutdownNotifications, TimeLimit
from dramatiq.results import ResultFailure, ResultMissing, Results

from concurrency_safe.contrib.dramatiq import requeue

logger = logging.getLogger("concurrency_safe")

#: Seconds that a copy waits for what an earlier delivery may just be doing: telling those that go on from it; between
#: two looks.
SETTLING, _LOOK = 1.0, 0.02

#: What is noted: the body's result; that those who go on from the message were told.
_RAN, _TOLD = "ran", "told"

#: The attribute of a message that has its result, and from which others go on: whether all did so; a middleware fails
#: at it while the broker is away. No context variable: an actor may run in a context of its own, which ends before the
#: message is acknowledged. And no `Delivery`, which knows the message: nobody but the collector would free the two.
_IS_TOLD = "concurrency_safe_is_told"

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


class Neighbours:
    """The middlewares of a broker with which a delivery has to do, as long as there are no others."""

    __slots__ = ("_interrupting", "broker", "middleware", "results")

    def __init__(self, broker: Any) -> None:
        """Look through those of now."""
        self.broker = broker
        self.middleware: list[Any] = list(broker.middleware)
        #: The one that keeps results, or None.
        self.results = next((one for one in self.middleware if isinstance(one, Results)), None)
        self._interrupting = [one for one in self.middleware if isinstance(one, (TimeLimit, ShutdownNotifications))]

    def are_current(self) -> bool:
        """Say whether the broker has the same ones still."""
        now = self.broker.middleware
        return len(now) == len(self.middleware) and all(map(operator.is_, now, self.middleware))

    def disarm(self, message: Any) -> None:
        """Take back what would interrupt the thread that processes `message`."""
        for one in self._interrupting:
            one.after_process_message(self.broker, message)  # type: ignore[no-untyped-call]


class Delivery:
    """One delivery of a message: whether it has run before, and what becomes of it."""

    __slots__ = (
        "_hidden",
        "_is_noted",
        "_is_undisturbed",
        "_neighbours",
        "_results",
        "message",
        "options",
        "work",
    )

    def __init__(self, neighbours: Neighbours, message: Any) -> None:
        """Read the message; nobody is asked yet."""
        self._neighbours = neighbours
        self._results: Any = neighbours.results
        self.message = message
        #: Its id and options; read once, since a proxy gives them.
        self.work: str = message.message_id
        self.options: dict[str, Any] = message.options
        self._hidden = requeue.ours_of(self.options)
        self._is_noted = False
        self._is_undisturbed = False

    def disarm(self) -> None:
        """Let nothing interrupt what comes after the body, or after the wait in vain. Twice is the same as once.

        An interrupt in a hook would end the worker's thread, and lose the message (dramatiq issue 445); in a call of
        `logging` it would leave a lock of the log's. Once the body has ended, time limits and shutdown notices have
        nothing left to end: the release has a time limit of its own.
        """
        if not self._is_undisturbed:
            self._neighbours.disarm(self.message)
            self._is_undisturbed = True

    @property
    def has_result(self) -> bool:
        """Whether the message's result is stored at all. A body, and our own end of a delivery, may change that."""
        return self._results is not None and bool(self._option("store_results", self._results.store_results))

    @property
    def may_have_run(self) -> bool:
        """Whether the results have to be asked."""
        return self.has_result and requeue.may_be_copy(self.message)

    def refuse_second_run(self) -> None:
        """Ask the results, and end a copy of a message that has run; one that may be no copy runs when nobody knows.

        Raises: HasRun, ResultsUnavailable.
        """
        message, backend = self.message, self._results.backend
        try:
            result = _find(backend, _note(message, _RAN), 0.0)
            if result is _MISSING:
                return
            until = time.monotonic() + self._patience()
            # Whoever waits for the result is one more that goes on from the message.
            awaited = [message, _note(message, _TOLD)] if self._goes_on() else [message]
            told = all(_find(backend, one, until) is not _MISSING for one in awaited)
        except Exception as error:
            if not requeue.is_copy(message):
                return
            raise ResultsUnavailable(f"{type(error).__name__}: {error}") from error
        raise HasRun(result, told)

    def note_run(self, result: Any) -> Exception | None:
        """Note that the body has run; its lock is held.

        Returns: why it could not be noted; then it is as without a guard, and the message may run a second time.
        """
        if self.has_result:
            self._is_noted = True
            try:
                self._results.backend.store_result(_note(self.message, _RAN), result, self._ttl())
            except Exception as error:  # noqa: BLE001 - the body has run, and nothing may make that a failure
                return error
        return None

    def tell_unnoted(self, error: Exception | None) -> None:
        """Say so to the log."""
        if error is not None:
            logger.warning("that message %s has run could not be noted: %s", self.work, error)

    def take_back(self, error: BaseException) -> None:
        """Take that note back: the body has run, but not to a good end, since `error` came behind it (a lost lock)."""
        if self._is_noted and self.has_result:
            try:
                self._results.backend.store_exception(_note(self.message, _RAN), error, self._ttl())
            except Exception as failure:  # noqa: BLE001 - `error` is what is to be told
                logger.warning("that message %s has failed could not be noted: %s", self.work, failure)

    def has_run(self, result: Any) -> None:
        """Remember that it has its result, until it is acknowledged; note it where the body did not (a skip)."""
        if not self._is_noted:
            self.tell_unnoted(self.note_run(result))
        if self.has_result and self._goes_on():
            setattr(self.message, _IS_TOLD, True)

    def note_told(self) -> None:
        """Note that those that go on from the message were told."""
        if self.has_result and self._goes_on():
            self._results.backend.store_result(_note(self.message, _TOLD), None, self._ttl())

    def hide_options(self) -> None:
        """Hide our options from the body: a message that it makes of this one, and sends, is another one."""
        for name in self._hidden:
            self.options.pop(name, None)

    def show_options(self) -> None:
        """Give them back. Twice is the same as once."""
        self.options.update(self._hidden)

    def _goes_on(self) -> bool:
        """Say whether anything goes on from the message."""
        return any(self._option(name, None) for name in ("pipe_target", "group_completion_callbacks", "on_success"))

    def _ttl(self) -> Any:
        return self._option("result_ttl", self._results.result_ttl)

    def _patience(self) -> float:
        """Give the seconds that settling may take: the body has to have some of its time, too."""
        limits: list[int] = [
            self._option("time_limit", one.time_limit)
            for one in self._neighbours.middleware
            if isinstance(one, TimeLimit)
        ]
        return min([SETTLING, *(limit / 2000 for limit in limits if limit)])

    def _option(self, name: str, default: Any) -> Any:
        if name in self.options:
            return self.options[name]
        return self._neighbours.broker.get_actor(self.message.actor_name).options.get(name, default)


def watch_hooks(broker: Any) -> None:
    """Learn of hooks that fail to tell those that go on from a message: Dramatiq tells its log, and nobody else."""
    for one in broker.middleware:
        if isinstance(one, (Callbacks, GroupCallbacks, Pipelines)):
            told: Any = one
            if not hasattr(told.after_process_message, _WATCHED):
                told.after_process_message = _watched(told.after_process_message)


def _watched(hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def watched(broker: Any, message: Any, **kwargs: Any) -> None:
        try:
            hook(broker, message, **kwargs)
        except BaseException:
            if hasattr(message, _IS_TOLD):
                setattr(message, _IS_TOLD, False)
            raise

    setattr(watched, _WATCHED, True)
    return watched


def note_told(broker: Any, message: Any) -> None:
    """Note that those that go on from `message` were told, just before it is acknowledged; unless that failed."""
    if getattr(message, _IS_TOLD, False):
        Delivery(Neighbours(broker), message).note_told()


def _note(message: Any, what: str) -> Any:
    """Give what a note is stored for: a message that there never is. Its id is a UUID, as backends may want it."""
    return message.copy(message_id=str(uuid.uuid5(_NOTES, f"{message.message_id} {requeue.entry(message)} {what}")))


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
