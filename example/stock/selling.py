"""The critical section. Every door of the example ends in `sell_one`."""

from __future__ import annotations

import time

from django.db.models.functions import Now

from example.stock.models import Product, Purchase

#: Seconds between reading the stock and writing it: the price, the card, the parcel.
WORK = 0.025


def sell_one(sku: str) -> bool:
    """Sell one `sku`: read the stock, do the slow work, write what was read less one.

    Two runs that overlap read the same number and write the same number, so one sale is lost.
    Nothing in here prevents that; it is the caller's door that does, or does not.

    Returns: True when sold, False when nothing was left.
    """
    product = Product.objects.annotate(read_at=Now()).get(sku=sku)
    if product.stock <= 0:
        return False
    time.sleep(WORK)
    Product.objects.filter(pk=product.pk).update(stock=product.stock - 1)
    # After the update and still inside the section: the interval covers the write.
    Purchase.objects.create(product=product, started=product.read_at, ended=Now())
    return True
