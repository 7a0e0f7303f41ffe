"""The table of ticks; it is used by `cron_guard(once_per=...)`, and by `run --once-per` and `--tick`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.db import migrations

from concurrency_safe.postgres.sql import CREATE_TICK, DROP_TICK

if TYPE_CHECKING:
    from django.db.backends.base.schema import BaseDatabaseSchemaEditor


def create(apps: object, editor: BaseDatabaseSchemaEditor) -> None:  # noqa: ARG001 - Django's signature
    """Create it."""
    if editor.connection.vendor == "postgresql":
        editor.execute(CREATE_TICK)


def drop(apps: object, editor: BaseDatabaseSchemaEditor) -> None:  # noqa: ARG001 - Django's signature
    """Drop it."""
    if editor.connection.vendor == "postgresql":
        editor.execute(DROP_TICK)


class Migration(migrations.Migration):
    """Create the table, on PostgreSQL."""

    dependencies: ClassVar[list[tuple[str, str]]] = [("concurrency_safe", "0001_fence")]
    operations: ClassVar[list[Any]] = [migrations.RunPython(create, drop)]
