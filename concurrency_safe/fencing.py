"""Writes that an owner who lost its lock can't make: each carries the token, and an older one changes nothing.

A lock can't stop a process that was paused (by the machine, by a long collection of garbage) after its session was cut:
it wakes up, believes that it holds the lock, and writes. A row that remembers the highest token it has seen refuses
that write. It covers writes to such rows, and nothing else: not a mail, not another service without tokens.
Source: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from concurrency_safe.core.errors import ConfigurationError, LockLost
from concurrency_safe.locks import HeldLock

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet

    _M = TypeVar("_M", bound=Model)


def fenced(queryset: QuerySet[_M], held: HeldLock, *, field: str = "fence") -> QuerySet[_M]:
    """Give the rows of `queryset` that no later holder has written to.

    `field` is a BigIntegerField(default=0) that holds the token of the last writer.

    Raises: ConfigurationError: the lock has no token (the setting FENCING is off).
    """
    if held.token is None:
        raise ConfigurationError(
            f"lock {', '.join(held.keys)!r} has no fencing token; set CONCURRENCY_SAFE = {{'FENCING': True}}"
        )
    rows: QuerySet[_M] = queryset.filter(**{f"{field}__lte": held.token})
    return rows


def fenced_update(queryset: QuerySet[Any], held: HeldLock, *, field: str = "fence", **values: Any) -> int:  # noqa: ANN401 - as QuerySet.update
    """Update all rows of `queryset` or none, and write the token into `field`; return how many there were.

        with lock(f"account:{pk}") as held:
            fenced_update(Account.objects.filter(pk=pk), held, balance=F("balance") - amount)

    Raises: LockLost: a later holder has written to one of them; nothing was changed then. ConfigurationError: no token.
    """
    from django.db import transaction  # noqa: PLC0415 - only who has querysets has Django

    with transaction.atomic(using=queryset.db):
        wanted = queryset.count()
        changed = fenced(queryset, held, field=field).update(**{field: held.token}, **values)
        if changed != wanted:
            raise LockLost(
                f"lock {', '.join(held.keys)!r} (token {held.token}): a later holder has written already; "
                "what this one wrote was refused, so start anew",
                ", ".join(held.keys),
            )
    return changed
