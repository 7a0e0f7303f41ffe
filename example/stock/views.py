"""The doors that are views: unguarded, a row lock, the decorator, and one that answers 409."""

from __future__ import annotations

import time

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_GET, require_POST

from concurrency_safe import concurrency_safe, current_lock
from example.stock.models import Product
from example.stock.selling import sell_one


@require_GET
def shelf(_request: HttpRequest) -> JsonResponse:
    """Show what is left of every product."""
    return JsonResponse(dict(Product.objects.order_by("sku").values_list("sku", "stock")))


@require_POST
def buy_unguarded(_request: HttpRequest, sku: str) -> JsonResponse:
    """Sell with no guard at all: this is the bug."""
    return JsonResponse({"sold": sell_one(sku)})


@require_POST
@transaction.atomic
def buy_with_row_lock(_request: HttpRequest, sku: str) -> JsonResponse:
    """Sell under Django's own row lock, which needs a row to lock and a transaction around it."""
    asked = time.monotonic()
    Product.objects.select_for_update().get(sku=sku)
    waited = time.monotonic() - asked
    return JsonResponse({"sold": sell_one(sku), "waited": waited})


@require_POST
@concurrency_safe(key="stock:{sku}")
def buy_guarded(_request: HttpRequest, sku: str) -> JsonResponse:
    """Sell one at a time; whoever comes meanwhile waits for its turn."""
    held = current_lock()
    return JsonResponse({"sold": sell_one(sku), "waited": held.waited if held else None})


def busy(_request: HttpRequest, sku: str) -> JsonResponse:
    """Tell the client to come back."""
    return JsonResponse({"busy": sku}, status=409)


@require_POST
@concurrency_safe(key="stock:{sku}", timeout=0, on_conflict=busy)
def buy_or_busy(_request: HttpRequest, sku: str) -> JsonResponse:
    """Sell one at a time; whoever comes meanwhile is told so at once."""
    return JsonResponse({"sold": sell_one(sku)})
