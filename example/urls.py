"""Addresses of the shop: one for each door that is a view."""

from __future__ import annotations

from django.urls import path

from example.stock import views

urlpatterns = [
    path("", views.shelf),
    path("buy/unguarded/<str:sku>/", views.buy_unguarded),
    path("buy/row-lock/<str:sku>/", views.buy_with_row_lock),
    path("buy/guarded/<str:sku>/", views.buy_guarded),
    path("buy/or-busy/<str:sku>/", views.buy_or_busy),
]
