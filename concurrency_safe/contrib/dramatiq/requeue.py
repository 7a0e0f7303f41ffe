"""Back to the queue: a copy of the message, later, with a count of its own; the original is acknowledged after that.

Not by an exception: Dramatiq's Retries would spend the actor's own retries, and Callbacks would tell `on_failure`. The
copy keeps the id, so that results, groups and pipelines find it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from typing import Any, NoReturn

from dramatiq.middleware import SkipMessage

from concurrency_safe.core.errors import LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import Retry

logger = logging.getLogger("concurrency_safe")

#: Options of a message that waits for a lock: conflicts so far in this attempt, when the first was (seconds since 1970,
#: shared by hosts), and which attempt (the option `retries` of Dramatiq's) they belong to.
CONFLICTS, SINCE, ATTEMPT = "cs_conflicts", "cs_since", "cs_attempt"

#: Option of a message that met itself at work: how often.
DUPLICATES = "cs_duplicates"

#: Option that tells a message that was sent from another one with the same id; its copies have it, too.
ENTRY = "cs_entry"

#: Our options of a message.
_OURS = frozenset((CONFLICTS, SINCE, ATTEMPT, DUPLICATES, ENTRY))

#: An attribute of a message that was put back, so that its end is no news.
PUT_BACK = "concurrency_safe_put_back"

#: How a copy of a running message comes back.
_DUPLICATE = Retry(delay=0.5, max_delay=30.0, limit=None, max_wait=None)

#: How often a copy is put back because the results can't be asked; about an hour.
_MOST_DUPLICATES = 150

#: The Redis broker keeps no message for longer than 7 days.
_LONGEST_DELAY = 6 * 86_400.0

#: Seconds before each further try to enqueue the copy, when the broker is away.
_PAUSES = (0.0, 0.5, 1.5)

_never = threading.Event()


class PutBack(SkipMessage):
    """The lock was taken: a copy of the message comes back later."""


class PutBackFailed(SkipMessage):
    """The lock was taken, and the broker did not take the copy: the message goes to the dead letter queue."""


class ConflictBudgetSpent(LockAcquireTimeout, SkipMessage):
    """The lock was taken at every try: the message goes to the dead letter queue."""


class StoreBudgetSpent(LockUnavailable, SkipMessage):
    """The lock store was away at every try: the message goes to the dead letter queue."""


def later(broker: Any, message: Any, policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> NoReturn:
    """Enqueue a copy of the message after the policy's delay, and end this one without any result.

    Raises: PutBack; ConflictBudgetSpent, StoreBudgetSpent: the policy's budget is spent; PutBackFailed.
    """
    options = message.options
    attempt = options.get("retries", 0)
    conflicts, since = 0, time.time()  # noqa: TID251 - hosts share no monotonic clock
    if options.get(ATTEMPT) == attempt:
        conflicts, since = int(options[CONFLICTS]), float(options[SINCE])
    waited = time.time() - since  # noqa: TID251 - see above
    if policy.is_spent(conflicts, waited):
        _give_up(broker, message, error, f"{conflicts} tries in {waited:.0f} s")
    _put_back(
        broker,
        message,
        policy.next_delay(conflicts, random.random),
        {CONFLICTS: conflicts + 1, SINCE: since, ATTEMPT: attempt},
        str(error),
    )


def duplicate(broker: Any, message: Any, why: str, error: Exception | None = None) -> NoReturn:
    """Enqueue this copy again after a while, and end it without any result: the message itself is at work, or may be.

    Raises: PutBack, PutBackFailed; `error`, once that has gone on for about an hour.
    """
    times = int(message.options.get(DUPLICATES, 0))
    if error is not None and times >= _MOST_DUPLICATES:
        raise error
    delay = _DUPLICATE.next_delay(times, random.random)
    _put_back(broker, message, delay, {DUPLICATES: times + 1}, why)


def drop(message: Any) -> NoReturn:
    """End a copy of a message that has run already, and leave that one's result alone.

    Raises: PutBack.
    """
    logger.info("message %s has run already; this copy of it ends", message.message_id)
    _end_without_result(message)


def stamp(message: Any) -> bool:
    """Tell a message that is sent from others with its id; False: it is a copy of one that was."""
    if ENTRY in message.options:
        return False
    message.options[ENTRY] = uuid.uuid4().hex
    return True


def entry(message: Any) -> str:
    """Give what tells the message from others with its id; empty: its sender doesn't know this middleware."""
    return str(message.options.get(ENTRY, ""))


def ours_of(options: dict[str, Any]) -> dict[str, Any]:
    """Give our own among the options of a message."""
    return {name: options[name] for name in _OURS.intersection(options)}


def is_copy(message: Any) -> bool:
    """Say whether there is another delivery of the same message: RabbitMQ says so, or it met one at work."""
    return bool(message.options.get(DUPLICATES) or is_redelivered(message))


def may_be_copy(message: Any) -> bool:
    """Say whether there may be one.

    It went back before, and its original was not acknowledged, for a worker that died just then; or it is that
    original, where the broker keeps no account of redeliveries.
    """
    return CONFLICTS in message.options or is_redelivered(message) is None or is_copy(message)


def is_redelivered(message: Any) -> bool | None:
    """Say whether the broker has delivered the message before; None: it keeps no account of that, as Redis."""
    return getattr(message, "redelivered", None)


def _put_back(broker: Any, message: Any, delay: float, options: dict[str, Any], why: str) -> NoReturn:
    delay = min(delay, _LONGEST_DELAY)
    options = {ENTRY: entry(message), **options}
    for pause in _PAUSES:
        _never.wait(pause)
        if pause or is_copy(message):
            # A broker that was away, as one that delivers again, may have the original still.
            options = {DUPLICATES: message.options.get(DUPLICATES) or 1, **options}
        try:
            broker.enqueue(message.copy(options=options), delay=int(delay * 1000))
            break
        except Exception:
            logger.exception("message %s could not be put back (%s)", message.message_id, why)
    else:
        # Rejected rather than run unguarded. RabbitMQ has lost us in between, most likely, and delivers it again: that
        # is no failure to tell anybody who waits for the result.
        if is_redelivered(message) is not None:
            message.options["store_results"] = False
        message.fail()
        raise PutBackFailed(f"the broker did not take the message back; it waited for a lock: {why}")
    logger.info(
        "message %s of actor %s goes back to the queue for %.1f s: %s",
        message.message_id,
        message.actor_name,
        delay,
        why,
    )
    _end_without_result(message)


def _end_without_result(message: Any) -> NoReturn:
    message.options["store_results"] = False  # this delivery's own; the copy has another dict
    setattr(message, PUT_BACK, True)
    raise PutBack("put back")


def _give_up(broker: Any, message: Any, error: LockAcquireTimeout | LockUnavailable, spent: str) -> NoReturn:
    """Send the message to the dead letter queue, and tell those whom Dramatiq would tell of a failure for good.

    Not by an exception: Retries would send it once more.
    """
    message.fail()
    reason = f"{error}; the budget of on_conflict is spent ({spent})"
    logger.error("message %s of actor %s is dead: %s", message.message_id, message.actor_name, reason)
    spent_error: LockAcquireTimeout | LockUnavailable
    if isinstance(error, LockAcquireTimeout):
        spent_error = ConflictBudgetSpent(reason, error.key, error.timeout, error.waited, error.holder)
    else:
        spent_error = StoreBudgetSpent(reason, error.key)
    actor = broker.get_actor(message.actor_name)
    told = {
        "on_failure": {"type": type(spent_error).__name__, "message": reason},
        "on_retry_exhausted": {
            "retries": message.options.get("retries", 0),
            "max_retries": message.options.get("max_retries", actor.options.get("max_retries")),
        },
    }
    for option, detail in told.items():
        name = message.options.get(option) or actor.options.get(option)
        if name:
            try:
                broker.get_actor(name).send(message.asdict(), detail)
            except Exception:
                logger.exception("%s of message %s could not be sent", option, message.message_id)
    raise spent_error
