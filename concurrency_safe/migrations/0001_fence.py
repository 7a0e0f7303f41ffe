"""The sequence behind fencing tokens; it is used where the setting FENCING is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.db import migrations

from concurrency_safe.postgres.sql import CREATE_FENCE, DROP_FENCE

if TYPE_CHECKING:
    from django.db.backends.base.schema import BaseDatabaseSchemaEditor


def create(apps: object, editor: BaseDatabaseSchemaEditor) -> None:  # noqa: ARG001 - Django's signature
    """Create it."""
    if editor.connection.vendor == "postgresql":
        editor.execute(CREATE_FENCE)


def drop(apps: object, editor: BaseDatabaseSchemaEditor) -> None:  # noqa: ARG001 - Django's signature
    """Drop it."""
    if editor.connection.vendor == "postgresql":
        editor.execute(DROP_FENCE)


class Migration(migrations.Migration):
    """Create the sequence, on PostgreSQL."""

    dependencies: ClassVar[list[tuple[str, str]]] = []
    operations: ClassVar[list[Any]] = [migrations.RunPython(create, drop)]
