"""Celery tasks that never run twice at once for one key.

@app.task(base=ConcurrencySafeTask, lock_key="withdraw:{user_id}")
def withdraw(user_id, amount): ...
"""

try:
    import celery as _celery  # noqa: F401 - asked for here, so that its absence is explained once
except ImportError as error:
    raise ImportError('Celery is not installed; run: pip install "django-concurrency-safe[celery]"') from error

from concurrency_safe.contrib.celery.task import ConcurrencySafeMixin, ConcurrencySafeTask

__all__ = ["ConcurrencySafeMixin", "ConcurrencySafeTask"]
