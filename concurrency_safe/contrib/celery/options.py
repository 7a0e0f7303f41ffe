"""The lock options of a task: found, checked, and made into a `Guard`.

Celery makes any option that it doesn't know an attribute without effect. A mistyped one would silently widen or lose
the lock, so what looks like one is refused, with the right name.
"""

from __future__ import annotations

import inspect
from typing import Any

from concurrency_safe.core.errors import ConfigurationError, KeyTemplateError
from concurrency_safe.core.suggest import nearest
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import Guard

#: The options of a guarded task, with their defaults (see `ConcurrencySafeMixin`).
OPTIONS = ("lock_key", "lock_timeout", "lock_shared", "lock_slots", "on_conflict")

#: What people write for them, from lock() and from other libraries.
MISTAKEN = {
    "key": "lock_key",
    "once": "lock_key",
    "unique_on": "lock_key",
    "timeout": "lock_timeout",
    "shared": "lock_shared",
    "slots": "lock_slots",
    "scope": "lock_key alone: a task's lock is held while its body runs",
}


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
    declared = {name for cls in _own_classes(task, base) for name in vars(cls)}
    for name in sorted(declared - set(OPTIONS)):
        if name.startswith("lock_"):
            raise ConfigurationError(
                f"task {task_name(task)}: there is no option {name!r}{nearest(name, OPTIONS)}; {_known()}"
            )
        if name in MISTAKEN:
            raise ConfigurationError(
                f"task {task_name(task)}: the option {name!r} does nothing; use {MISTAKEN[name]}; {_known()}"
            )
    if read_key(task, base) is None:
        useless = sorted(vars(type(task)).keys() & set(OPTIONS) - {"lock_key"})
        if useless:
            raise ConfigurationError(
                f"task {task_name(task)}: {', '.join(useless)} without lock_key guards nothing; "
                'add lock_key="name:{argument}", or lock_key=True for all arguments'
            )


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


def _known() -> str:
    return f"the options are {', '.join(OPTIONS)}"
