"""Dramatiq actors that never run twice at once for one key.

broker.add_middleware(ConcurrencySafeMiddleware())

@dramatiq.actor(lock_key="withdraw:{user_id}")
def withdraw(user_id, amount): ...
"""

try:
    import dramatiq as _dramatiq  # noqa: F401 - asked for here, so that its absence is explained once
except ImportError as error:
    raise ImportError('Dramatiq is not installed; run: pip install "django-concurrency-safe[dramatiq]"') from error

from concurrency_safe.contrib.dramatiq.middleware import ConcurrencySafeMiddleware

__all__ = ["ConcurrencySafeMiddleware"]
