"""Real servers and other support for the tests of code that takes locks."""

from __future__ import annotations

from concurrency_safe.testing.postgres import PostgresServer
from concurrency_safe.testing.process import ServerError
from concurrency_safe.testing.valkey import ValkeyServer

__all__ = ["PostgresServer", "ServerError", "ValkeyServer"]
