"""The same command, guarded by its class."""

from __future__ import annotations

from concurrency_safe.contrib.cron import GuardedCommand
from tests.contrib.cron_app.management.commands import plain


class Command(GuardedCommand, plain.Command):
    lock_key = "nightly:{shop}"
