"""A system check: `manage.py check` finds the mistakes that would stop a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import current_app
from django.core.checks import CheckMessage, Error, register

from concurrency_safe.contrib.celery import ConcurrencySafeMixin
from concurrency_safe.contrib.celery.options import unguarded_options
from concurrency_safe.core.errors import ConcurrencySafeError


@register("concurrency_safe")
def check_tasks(app_configs: Sequence[Any] | None = None, **_: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Build every task of the current Celery app, as a worker does at its start."""
    try:
        current_app.loader.import_default_modules()
        tasks = list(current_app.tasks.values())
    except ConcurrencySafeError as error:
        return [Error(str(error), id="concurrency_safe.E010")]
    return [
        Error(
            f"task {task.name}: {', '.join(useless)} without base=ConcurrencySafeTask guards nothing",
            hint="add the base, or remove the option",
            id="concurrency_safe.E011",
        )
        for task in tasks
        if not isinstance(task, ConcurrencySafeMixin) and (useless := unguarded_options(task))
    ]
