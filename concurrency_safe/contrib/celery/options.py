"""The lock options of a task: found, checked, and made into a `Guard`.

Celery makes any option that it doesn't know an attribute without effect, so what looks like one of ours is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

from concurrency_safe.core.adapter_options import OPTIONS, refuse_mistaken, refuse_without_key
from concurrency_safe.core.errors import ConfigurationError, KeyTemplateError
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import Guard


def task_name(task: Any) -> str:
    """Name `task` for a message, also before it is registered."""
    return getattr(task, "name", None) or f"{type(task).__module__}.{type(task).__qualname__}"


def read(task: Any, option: str) -> Any:
    """Give an option as it was declared: a callable is not bound to the task."""
    value = inspect.getattr_static(task, option, None)
    return value.__func__ if isinstance(value, staticmethod) else value


def read_key(task: Any, base: type) -> Any:
    """Give the `lock_key` of `task`; None: it is not guarded.

    The default of a base that the whole app has is no wish of the task's: Celery's own tasks have that base, too.
    """
    key = read(task, "lock_key")
    if any("lock_key" in vars(cls) for cls in _own_classes(task, base)):
        return key
    app = getattr(task, "app", None)
    return None if app is not None and isinstance(task, app.Task) else key


def _own_classes(task: Any, base: type) -> list[type]:
    """Give the classes that declare `task`, from itself to those above which ours begin; without the app's own base."""
    app_base = getattr(getattr(task, "app", None), "Task", None)
    classes = [cls for cls in type(task).__mro__ if issubclass(cls, base) and cls is not app_base]
    return [cls for cls in classes if not cls.__module__.startswith(__package__)]


def refuse_mistakes(task: Any, base: type) -> None:
    """Refuse options that look like ours and aren't, and options without a key.

    Only what the task and the classes between it and `base` declare is looked at.

    Raises: ConfigurationError.
    """
    who = f"task {task_name(task)}"
    refuse_mistaken(who, {name for cls in _own_classes(task, base) for name in vars(cls)})
    if read_key(task, base) is None:
        refuse_without_key(who, vars(type(task)))


def unguarded_options(task: Any) -> list[str]:
    """Name the lock options on a task that has not our base, where they have no effect."""
    return [name for name in OPTIONS if inspect.getattr_static(task, name, None) is not None]


def build(task: Any, base: type) -> tuple[Guard, KeyTemplate] | None:
    """Make the guard of `task`, and the template of its key; None: it is not guarded.

    Raises: ConfigurationError, KeyTemplateError: with the task's name before what is wrong.
    """
    key = read_key(task, base)
    if key is None:
        return None
    try:
        guard = Guard(
            key,
            timeout=read(task, "lock_timeout"),
            shared=read(task, "lock_shared"),
            slots=read(task, "lock_slots"),
            on_conflict=read(task, "on_conflict"),
        )
        return guard, KeyTemplate(key, task.run, name=task_name(task))
    except (ConfigurationError, KeyTemplateError) as error:
        raise type(error)(f"task {task_name(task)}: {error}", error.key) from None
