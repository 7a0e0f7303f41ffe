"""System checks: is this project's configuration dangerous? They connect to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.checks import CheckMessage, Error, Tags, register

from concurrency_safe.conf import get_settings
from concurrency_safe.core.errors import ConfigurationError
from concurrency_safe.postgres.alias import connection_of, require_postgresql


@register("concurrency_safe")
def check_settings(app_configs: Sequence[Any] | None = None, **_: Any) -> list[CheckMessage]:  # noqa: ARG001, ANN401 - Django's signature
    """Report settings that no lock could be taken with."""
    try:
        settings = get_settings()
        connection = connection_of(settings.using)
        if settings.dsn is None:
            require_postgresql(connection)
    except ConfigurationError as error:
        return [Error(str(error), id="concurrency_safe.E001")]
    return []


@register(Tags.security, deploy=True)
def check_enabled(app_configs: Sequence[Any] | None = None, **_: Any) -> list[CheckMessage]:  # noqa: ARG001, ANN401 - Django's signature
    """Report locks that are switched off, which is meant for tests."""
    try:
        enabled = get_settings().enabled
    except ConfigurationError:
        return []  # check_settings tells it
    if enabled:
        return []
    return [Error("CONCURRENCY_SAFE = {'ENABLED': False}: nothing is guarded", id="concurrency_safe.E002")]
