"""The doors that are Celery tasks: unguarded, and guarded with a retry on conflict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.signals import task_retry

from concurrency_safe import Retry
from concurrency_safe.contrib.celery import ConcurrencySafeTask
from example.celery import app
from example.stock.models import Product, PutBack
from example.stock.selling import sell_one

if TYPE_CHECKING:
    from celery.app.task import Context


@app.task
def buy_unguarded(sku: str) -> bool:
    """Sell with no guard at all: this is the bug."""
    return sell_one(sku)


#: A sale holds the lock for milliseconds, so the delays of "retry" (1 s, growing to 30 s) are long.
SOON = Retry(delay=0.1, max_delay=1.0)


@app.task(base=ConcurrencySafeTask, lock_key="stock:{sku}", on_conflict=SOON)
def buy_guarded(sku: str) -> bool:
    """Sell one at a time; a task that finds the lock taken goes back to the queue."""
    return sell_one(sku)


@task_retry.connect(sender=buy_guarded)
def log_put_back(request: Context, **_signal: object) -> None:
    """Note each return to the queue, as Celery reports it."""
    (sku,) = request.args or ()
    PutBack.objects.create(product=Product.objects.get(sku=sku), task_id=request.id)
