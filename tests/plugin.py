"""Loaded before Django reads its settings (`-p tests.plugin`): gives the tests a database server.

DATABASE_URL names one; else the tests start their own, which ends with them. There is no skipping: without a server
the tests fail.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

from concurrency_safe.testing import postgres_dsn


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, object, object]:
    """Set DATABASE_URL; a wrapper runs before pytest-django loads the settings."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        # Whoever starts us in the background (nohup, a shell's &) lets them be ignored, by everything we start, too.
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ["DATABASE_URL"] = postgres_dsn()
    return (yield)
