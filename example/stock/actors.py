"""The doors that are Dramatiq actors: unguarded, and guarded with a retry on conflict."""

from __future__ import annotations

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware

from concurrency_safe import Retry
from example import settings
from example.stock.models import Product, PutBack
from example.stock.selling import sell_one

QUEUE = settings.DRAMATIQ_QUEUE


@dramatiq.actor(queue_name=QUEUE, store_results=True)
def buy_unguarded(sku: str) -> bool:
    """Sell with no guard at all: this is the bug."""
    return sell_one(sku)


#: A sale holds the lock for milliseconds, so the delays of "retry" (1 s, growing to 30 s) are long.
SOON = Retry(delay=0.1, max_delay=1.0)


@dramatiq.actor(queue_name=QUEUE, store_results=True, lock_key="stock:{sku}", lock_timeout=0.05, on_conflict=SOON)
def buy_guarded(sku: str) -> bool:
    """Sell one at a time; a message that finds the lock taken for 50 ms goes back to the queue."""
    return sell_one(sku)


@dramatiq.actor(queue_name=QUEUE, store_results=True)
def answer() -> bool:
    """Say that somebody works here."""
    return True


class LogPutBacks(Middleware):
    """Notes each return to the queue: what Dramatiq calls a skip."""

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:  # noqa: ARG002 - Dramatiq's
        """Note it."""
        (sku,) = message.args
        PutBack.objects.create(product=Product.objects.get(sku=sku), task_id=message.message_id)


dramatiq.get_broker().add_middleware(LogPutBacks())
