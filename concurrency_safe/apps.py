"""The Django app: `INSTALLED_APPS += ["concurrency_safe"]` registers its system checks."""

from __future__ import annotations

import sys
from importlib import import_module

from django.apps import AppConfig


class ConcurrencySafeConfig(AppConfig):
    """Registers the checks. Its migration makes the sequence behind fencing tokens."""

    name = "concurrency_safe"
    verbose_name = "Locks"

    def ready(self) -> None:
        """Register the checks, those of Celery's tasks only where Celery is in use."""
        import_module("concurrency_safe.checks")
        if "celery" in sys.modules:
            import_module("concurrency_safe.contrib.celery.checks")
