"""Back to the queue: the same message, later, with a count of its own.

Not `Task.retry`: that spends the task's own retries, and writes to the shared task object. What is sent keeps the id,
chain, chord, group, callbacks, priority, queue, expiry and headers (celery.app.task.Task.signature_from_request).
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any, NoReturn

from celery import signals, states
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.exceptions import Retry as CeleryRetry
from kombu import serialization
from kombu.exceptions import EncodeError

from concurrency_safe.core.errors import LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import Retry

#: Headers of a message that waits for a lock: conflicts so far in this attempt, when the first was (seconds since 1970,
#: shared by hosts), and which attempt (`request.retries`) they belong to.
CONFLICTS, SINCE, ATTEMPT = "cs-conflicts", "cs-since", "cs-attempt"

#: Header of a message that met its own task at work: how often.
DUPLICATES = "cs-duplicates"

#: What a worker's main process writes into a request, since the pool's process is told neither: when the message came
#: (seconds since 1970), and how its body is encoded.
RECEIVED, CONTENT_TYPE = "cs_received", "cs_content_type"

#: Seconds that a message may wait in a worker before its transport may have delivered it to another one, where the
#: transport's `visibility_timeout` is not set: SQS' default of Celery; that of Redis is an hour.
VISIBLE_AFTER = 1800.0

#: Seconds that a copy which has the lock waits for the state of a task that may just have ended; between two looks.
SETTLING, _LOOK = 1.0, 0.02

#: How a copy of a running task comes back: soon, since an own retry overtakes its predecessor by moments only.
_DUPLICATE = Retry(delay=0.5, max_delay=30.0, limit=None, max_wait=None)


def later(task: Any, policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> NoReturn:
    """Send the message again after the policy's delay, and end this run with the state RETRY.

    Raises: celery.exceptions.Retry; `error` itself, when the policy's budget is spent; when the broker is away, Reject
        (with acks_late) or its error.
    """
    request = task.request
    headers: dict[str, Any] = dict(request.headers or {})
    conflicts, since = 0, time.time()  # noqa: TID251 - hosts share no monotonic clock
    if headers.get(ATTEMPT) == request.retries:
        conflicts, since = int(headers[CONFLICTS]), float(headers[SINCE])
    waited = time.time() - since  # noqa: TID251 - see above
    if policy.is_spent(conflicts, waited):
        raise error
    delay = _next_delay(task, policy, conflicts)
    headers |= {CONFLICTS: conflicts + 1, SINCE: since, ATTEMPT: request.retries}
    signature = _send(task, delay, headers)
    raise CeleryRetry(message=f"Retry in {delay:.1f}s: {error}", exc=error, when=delay, sig=signature)  # type: ignore[arg-type]  # a float is a Real


def duplicate(task: Any) -> NoReturn:
    """Send this copy again after a while, and end its run without any state: the task itself is at work.

    Raises: celery.exceptions.Ignore; when the broker is away, Reject (with acks_late) or its error.
    """
    headers: dict[str, Any] = dict(task.request.headers or {})
    times = int(headers.get(DUPLICATES, 0))
    headers[DUPLICATES] = times + 1
    _send(task, _next_delay(task, _DUPLICATE, times), headers)
    raise Ignore


@signals.task_received.connect
def _note_delivery(request: Any, **_: Any) -> None:
    noted = {RECEIVED: time.time(), CONTENT_TYPE: request.content_type}  # noqa: TID251 - for another process
    request.request_dict.update(noted)


def is_copy(task: Any) -> bool:
    """Say whether there may be two messages of this task: one sent by `duplicate`, or one delivered twice.

    Also where the second one runs, or has run, elsewhere: when this one was prefetched too long ago.
    """
    request = task.request
    if (request.headers or {}).get(DUPLICATES) or (request.delivery_info or {}).get("redelivered"):
        return True
    received = getattr(request, RECEIVED, None)
    visible_after = _visibility_timeout(task) or VISIBLE_AFTER
    return received is not None and time.time() - received >= visible_after  # noqa: TID251 - another process' time


def is_settled(task: Any, patience: float) -> bool:
    """Say whether this task has its final state already: its callbacks were called, and may not be again.

    False where that can't be known: without a result backend, or with `ignore_result`. `patience`: seconds that it may
    take, for one who holds the lock: Celery stores the state when the body has ended, and the lock is released by then.

    Raises: whatever the result backend does when it can't be reached.
    """
    final = {states.SUCCESS, states.REVOKED}
    if task.acks_on_failure_or_timeout is not False:  # else its message goes back to the broker, and shall run again
        final.add(states.FAILURE)
    until = time.monotonic() + patience
    never = threading.Event()
    try:
        while task.backend.get_state(task.request.id) not in final:
            if time.monotonic() >= until or task.request.ignore_result:
                return False
            never.wait(_LOOK)
    except NotImplementedError:  # there is no backend
        return False
    return True


def _visibility_timeout(task: Any) -> float | None:
    return (task.app.conf.broker_transport_options or {}).get("visibility_timeout")


def _next_delay(task: Any, policy: Retry, conflicts: int) -> float:
    """Draw the seconds until the next try.

    A worker keeps a message with a countdown unacknowledged, so Redis' transport would deliver a second one after its
    visibility timeout.
    """
    delay = policy.next_delay(conflicts, random.random)
    visible_after = _visibility_timeout(task)
    return min(delay, visible_after / 2) if visible_after else delay


def _send(task: Any, delay: float, headers: dict[str, Any]) -> Any:
    request = task.request
    options: dict[str, Any] = {"countdown": delay, "retries": request.retries, "headers": headers}
    encoded_as = serialization.registry.type_to_name.get(getattr(request, CONTENT_TYPE, None))  # type: ignore[attr-defined]  # kombu has it
    if encoded_as is not None:
        options["serializer"] = encoded_as
    if request.ignore_result:  # which Celery forgets before 5.5
        options["ignore_result"] = True
    signature = task.signature_from_request(request, **options)
    try:
        signature.apply_async()
    except (SoftTimeLimitExceeded, EncodeError):
        raise  # the task's own business, not the broker's
    except Exception as error:
        if not task.acks_late:
            raise  # the message is gone: the task has failed
        raise Reject(error, requeue=True) from error  # it is the broker's still, and comes back
    return signature
