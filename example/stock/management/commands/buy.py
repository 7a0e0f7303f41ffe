"""The door that is a script: `python -m example.manage buy SKU`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from django.core.management.base import BaseCommand

from concurrency_safe import lock
from example.stock.selling import sell_one

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(BaseCommand):
    """Buy from a script, one at a time among all scripts, views and tasks."""

    help = "Buy one or more of a product under its lock; prints a JSON line for each."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the product, how many, and the starting line."""
        parser.add_argument("sku")
        parser.add_argument("--times", type=int, default=1, help="how many to buy (default: 1)")
        parser.add_argument("--starting-line", action="store_true", help="print 'ready', then wait for a line")

    def handle(self, *_args: object, sku: str, times: int, starting_line: bool, **_options: object) -> None:
        """Buy `times` of `sku`."""
        if starting_line:
            self.stdout.write("ready")
            self.stdout.flush()
            sys.stdin.readline()
        for _ in range(times):
            with lock(f"stock:{sku}") as held:
                sold = sell_one(sku)
            self.stdout.write(json.dumps({"sold": sold, "waited": held.waited}))
