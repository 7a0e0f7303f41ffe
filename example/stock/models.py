"""What is on the shelf, and two logs that let anyone check how it was sold."""

from __future__ import annotations

from django.db import models


class Product(models.Model):
    """Something to sell, and how many of it are left."""

    sku = models.CharField(max_length=64, unique=True)
    stock = models.IntegerField()

    def __str__(self) -> str:
        return f"{self.sku} ({self.stock} left)"


class Purchase(models.Model):
    """One sale: when it read the stock and when it had written it, by the database's clock."""

    product = models.ForeignKey(Product, models.CASCADE, related_name="purchases")
    started = models.DateTimeField()
    ended = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.product_id}: {self.started.isoformat()} to {self.ended.isoformat()}"


class PutBack(models.Model):
    """One time that a task found the lock taken and went back to the queue."""

    product = models.ForeignKey(Product, models.CASCADE, related_name="put_backs")
    task_id = models.CharField(max_length=64)

    def __str__(self) -> str:
        return f"{self.product_id}: {self.task_id}"
