"""The same command; a second one is skipped."""

from __future__ import annotations

from tests.contrib.cron_app.management.commands import nightly


class Command(nightly.Command):
    on_conflict = "skip"
