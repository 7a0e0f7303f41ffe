"""A command as an app has it: it knows no lock."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from django.core.management.base import BaseCommand, CommandError


class Command(BaseCommand):
    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--until-eof", action="store_true")
        parser.add_argument("--status", type=int)
        parser.add_argument("--error", type=int)
        parser.add_argument("--shop", default="x")
        parser.add_argument("words", nargs="*")

    def handle(self, *_args: object, words: list[str], until_eof: bool, **options: object) -> None:
        self.stdout.write(" ".join(["ran", *words]))
        self.stdout.flush()
        if until_eof:
            sys.stdin.read()
        if options["status"] is not None:
            sys.exit(options["status"])  # type: ignore[arg-type]
        if options["error"] is not None:
            raise CommandError("of its own", returncode=options["error"])  # type: ignore[arg-type]
