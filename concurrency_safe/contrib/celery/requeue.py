"""Back to the queue: the same message, later, with a count of its own.

Not `Task.retry`: that spends the task's own retries, and writes to the shared task object. What is sent keeps the id,
chain, chord, group, callbacks, priority, queue, expiry and headers (celery.app.task.Task.signature_from_request).
"""

from __future__ import annotations

import random
import time
from typing import Any

from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.exceptions import Retry as CeleryRetry

from concurrency_safe.core.errors import LockAcquireTimeout, LockUnavailable
from concurrency_safe.core.policies import Retry

#: Headers of a message that waits for a lock: conflicts so far in this attempt, when the first was (seconds since 1970,
#: shared by hosts), and which attempt (`request.retries`) they belong to.
CONFLICTS, SINCE, ATTEMPT = "cs-conflicts", "cs-since", "cs-attempt"

#: Header of a message that met its own task at work: how often.
DUPLICATES = "cs-duplicates"

#: How a copy of a running task comes back: soon, since an own retry overtakes its predecessor by moments only.
_DUPLICATE = Retry(delay=0.5, max_delay=30.0, limit=None, max_wait=None)


def later(task: Any, policy: Retry, error: LockAcquireTimeout | LockUnavailable) -> None:
    """Send the message again after the policy's delay, and end this run with the state RETRY.

    Raises: celery.exceptions.Retry; `error` itself, when the policy's budget is spent; Reject: the broker is away.
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


def duplicate(task: Any) -> None:
    """Send this copy again after a while, and end its run without any state: the task itself is at work.

    Raises: celery.exceptions.Ignore; Reject: the broker is away.
    """
    headers: dict[str, Any] = dict(task.request.headers or {})
    times = int(headers.get(DUPLICATES, 0))
    headers[DUPLICATES] = times + 1
    _send(task, _next_delay(task, _DUPLICATE, times), headers)
    raise Ignore


def is_copy(task: Any) -> bool:
    """Say whether this may be a second message of the same task: sent by `duplicate`, or redelivered by the broker."""
    request = task.request
    return bool((request.headers or {}).get(DUPLICATES) or (request.delivery_info or {}).get("redelivered"))


def _next_delay(task: Any, policy: Retry, conflicts: int) -> float:
    """Draw the seconds until the next try.

    A worker keeps a message with a countdown unacknowledged, so Redis' transport would deliver a second one after its
    visibility timeout.
    """
    delay = policy.next_delay(conflicts, random.random)
    visible_after = (task.app.conf.broker_transport_options or {}).get("visibility_timeout")
    return min(delay, visible_after / 2) if visible_after else delay


def _send(task: Any, delay: float, headers: dict[str, Any]) -> Any:
    request = task.request
    signature = task.signature_from_request(request, countdown=delay, retries=request.retries, headers=headers)
    try:
        signature.apply_async()
    except SoftTimeLimitExceeded:
        raise  # the task's own business, not the broker's
    except Exception as error:
        # With acks_late the message is still the broker's, and comes back; else Celery marks the task as failed.
        raise Reject(error, requeue=bool(task.acks_late)) from error
    return signature
