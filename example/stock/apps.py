"""Django's entry for the stock app."""

from __future__ import annotations

from django.apps import AppConfig


class StockConfig(AppConfig):
    """Register the models of the example."""

    name = "example.stock"
