"""`manage.py locks`: who holds a lock, and who waits for one."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, cast

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from concurrency_safe.contrib.cron import NO_STORE
from concurrency_safe.core.errors import ConcurrencySafeError

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(BaseCommand):
    """Show the locks of the database; `concurrency-safe locks` does the same, and can watch."""

    help = "Show who holds a lock and who waits for one, in the order of the queues."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("keys", metavar="KEY", nargs="*", help="a key whose holder may not tell its text")
        parser.add_argument("--json", action="store_true", help="print a list of objects")

    def handle(self, *_args: Any, keys: list[str], json: bool, **_options: Any) -> None:
        """Show them.

        Raises: CommandError: with exit status 69 when the lock store can't be read.
        """
        from rich.console import Console  # noqa: PLC0415 - --help needs no rich

        from concurrency_safe.tables import as_json, as_table, census  # noqa: PLC0415 - the same

        try:
            taken = census(keys)
        except ConcurrencySafeError as error:
            raise CommandError(f"can't tell: {error}", returncode=NO_STORE) from error
        if json:
            self.stdout.write(as_json(taken))
        else:
            console = Console(file=cast("IO[str]", self.stdout), force_terminal=self.stdout.isatty())
            console.print(as_table(taken))
