"""The tables of the stock app."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import django.db.models.deletion
from django.db import migrations, models

if TYPE_CHECKING:
    from django.db.migrations.operations.base import Operation


def _id() -> models.BigAutoField[int, int]:
    return models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")


def _product(related_name: str) -> models.ForeignKey[models.Model, models.Model]:
    return models.ForeignKey(
        on_delete=django.db.models.deletion.CASCADE,
        related_name=related_name,
        to="stock.product",
    )


class Migration(migrations.Migration):
    """Products, and the logs of their sales and of the tasks that went back to the queue."""

    initial = True

    operations: ClassVar[list[Operation]] = [
        migrations.CreateModel(
            name="Product",
            fields=[
                ("id", _id()),
                ("sku", models.CharField(max_length=64, unique=True)),
                ("stock", models.IntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Purchase",
            fields=[
                ("id", _id()),
                ("started", models.DateTimeField()),
                ("ended", models.DateTimeField()),
                ("product", _product("purchases")),
            ],
        ),
        migrations.CreateModel(
            name="PutBack",
            fields=[
                ("id", _id()),
                ("task_id", models.CharField(max_length=64)),
                ("product", _product("put_backs")),
            ],
        ),
    ]
