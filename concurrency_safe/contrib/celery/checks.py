"""A system check: `manage.py check` finds the mistakes that would stop a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import current_app
from django.core.checks import CheckMessage, Error, register

from concurrency_safe.contrib.celery.task import mistake_of
from concurrency_safe.core.errors import ConcurrencySafeError

_checking = False


@register("concurrency_safe")
def check_tasks(app_configs: Sequence[Any] | None = None, **_: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Build every task of the current Celery app, as a worker does at its start.

    Not in a worker: Celery runs the checks there and passes over what they say, and an app builds its tasks only
    once, so the mistake must stay for the worker's own start to fail on. Nor again inside itself, since importing the
    tasks makes Celery run all checks.
    """
    global _checking  # noqa: PLW0603 - whether this function is under way
    if _checking or current_app.loader.worker_initialized:
        return []
    _checking = True
    try:
        current_app.loader.import_default_modules()
        tasks = list(current_app.tasks.values())
    except ConcurrencySafeError as error:
        return [Error(str(error), id="concurrency_safe.E010")]
    finally:
        _checking = False
    mistakes = map(mistake_of, tasks)
    return [Error(mistake, id="concurrency_safe.E011") for mistake in mistakes if mistake is not None]
