"""The lock options of a task: found, checked, and made into a `Guard`.

Celery makes any option that it doesn't know an attribute without effect, so what looks like one of ours is refused.
"""

from __future__ import annotations

import inspect
from typing import IO, Any

import click
from celery import Celery, current_app

from concurrency_safe.core.adapter_options import OPTIONS, refuse_mistaken, refuse_without_key
from concurrency_safe.core.errors import ConfigurationError, KeyTemplateError
from concurrency_safe.core.templates import KeyTemplate
from concurrency_safe.guards import Guard


class _Shown(click.ClickException):
    """Ends Celery's commands, which are Click's, by one line and exit status 1: a traceback would bury the line."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line to stderr."""
        click.echo(f"Error: {self}", file=file, err=True)


class TaskConfigurationError(ConfigurationError, _Shown):  # type: ignore[misc]  # ours may have no message
    """An option of a task is not usable."""


class TaskKeyError(KeyTemplateError, _Shown):  # type: ignore[misc]  # see above
    """The `lock_key` of a task is not usable."""


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
    app_wide = issubclass(_app_base(task), base)
    own = "lock_key" in vars(task) or any("lock_key" in vars(cls) for cls in _own_classes(task))
    return key if own or not app_wide else None


def _app_base(task: Any) -> type:
    """Give the base that a task has when it names none; without binding the task to its app, which has effects."""
    declared = inspect.getattr_static(type(task), "app")  # by a decorator; else the property of Task
    app = declared if isinstance(declared, Celery) else getattr(task, "_app", None) or current_app
    base: type = app.Task
    return base


def _own_classes(task: Any) -> list[type]:
    """Give the classes that declare `task`: without the app-wide ones, and without the libraries'."""
    classes = [cls for cls in type(task).__mro__ if cls not in _app_base(task).__mro__]
    return [cls for cls in classes if not cls.__module__.startswith((__package__, "celery."))]


def _refuse_mistakes(task: Any, base: type) -> None:
    """Refuse options that look like ours and aren't, and options without a key.

    Mistakes are looked for in whatever derives from `base`; a mix-in that knows nothing of us may have any attribute.
    """
    who = f"task {task_name(task)}"
    ours = [cls for cls in type(task).__mro__ if issubclass(cls, base) and not cls.__module__.startswith(__package__)]
    mine = {name for name in vars(task) if name.startswith("lock_")}
    refuse_mistaken(who, {name for cls in ours for name in vars(cls)} | mine)
    if read_key(task, base) is None:
        refuse_without_key(who, {name for cls in _own_classes(task) for name in vars(cls)} | set(vars(task)))


def unguarded_options(task: Any) -> list[str]:
    """Name the lock options on a task that has not our base, where they have no effect."""
    return [name for name in OPTIONS if inspect.getattr_static(task, name, None) is not None]


def _refuse_unguardable(run: Any) -> None:
    """Refuse a body that Celery does not run to its end: the lock would be released before the work."""
    kinds = {inspect.iscoroutinefunction: "is async", inspect.isgeneratorfunction: "is a generator"}
    kinds[inspect.isasyncgenfunction] = "is an async generator"
    for is_kind, words in kinds.items():
        if is_kind(run):
            raise ConfigurationError(
                f"its body {words}, which Celery calls and doesn't run; make it a plain function "
                "(asyncio.run(...) inside it runs a coroutine)"
            )


def build(task: Any, base: type) -> tuple[Guard, KeyTemplate] | None:
    """Make the guard of `task`, and the template of its key; None: it is not guarded.

    Raises: TaskConfigurationError, TaskKeyError: with the task's name before what is wrong.
    """
    who = f"task {task_name(task)}: "
    try:
        return _build(task, base)
    except KeyTemplateError as error:
        raise TaskKeyError(f"{who}{error}", error.key) from None
    except ConfigurationError as error:
        raise TaskConfigurationError(f"{who}{str(error).removeprefix(who)}", error.key) from None


def _build(task: Any, base: type) -> tuple[Guard, KeyTemplate] | None:
    _refuse_mistakes(task, base)
    key = read_key(task, base)
    if key is None:
        return None
    _refuse_unguardable(task.run)
    guard = Guard(
        key,
        timeout=read(task, "lock_timeout"),
        shared=read(task, "lock_shared"),
        slots=read(task, "lock_slots"),
        on_conflict=read(task, "on_conflict"),
    )
    return guard, guard.template(task.run, task_name(task))
