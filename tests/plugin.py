"""Loaded before Django reads its settings (`-p tests.plugin`): gives the tests a database server.

DATABASE_URL names one; else the tests start their own, which ends with them. There is no skipping: without a server
the tests fail.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from concurrency_safe.testing import postgres_dsn


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, object, object]:
    """Set DATABASE_URL; a wrapper runs before pytest-django loads the settings."""
    os.environ["DATABASE_URL"] = postgres_dsn()
    return (yield)
