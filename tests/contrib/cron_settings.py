"""Settings of the processes that run commands for test_cron."""

from __future__ import annotations

from tests import settings
from tests.settings import *  # noqa: F403 - all of them

INSTALLED_APPS = [*settings.INSTALLED_APPS, "tests.contrib.cron_app"]
