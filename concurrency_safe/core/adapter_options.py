"""The lock options of a task or an actor: their names, their defaults, and what people write for them by mistake.

A mistyped option would silently widen or lose the lock, so what looks like one is refused, with the right name.
"""

from __future__ import annotations

from collections.abc import Iterable

from .errors import ConfigurationError
from .suggest import nearest

#: The options of a guarded body.
OPTIONS = ("lock_key", "lock_timeout", "lock_shared", "lock_slots", "on_conflict")

#: What people write for them, from lock() and from other libraries.
MISTAKEN = {
    "key": "lock_key",
    "once": "lock_key",
    "unique_on": "lock_key",
    "timeout": "lock_timeout",
    "shared": "lock_shared",
    "slots": "lock_slots",
    "scope": "lock_key alone: the lock is held while the body runs",
}

#: How the names of options begin, and what is left of them when they are written otherwise: lockKey, onconflict.
_LIKE_OURS = ("lock_", "on_conf")
_SQUASHED = {name.replace("_", "") for name in OPTIONS}

KNOWN = f"the options are {', '.join(OPTIONS)}"


def looks_like_ours(name: str) -> bool:
    """Say whether `name` is an option of ours, rightly written or not."""
    return name.startswith(_LIKE_OURS) or name.replace("_", "").lower() in _SQUASHED


def refuse_mistaken(who: str, names: Iterable[str]) -> None:
    """Refuse names that look like lock options and aren't. `who`: whose they are, as in "task pay".

    Raises: ConfigurationError.
    """
    for name in sorted(set(names) - set(OPTIONS)):
        if looks_like_ours(name):
            raise ConfigurationError(f"{who}: there is no option {name!r}{nearest(name, OPTIONS)}; {KNOWN}")
        if name.lower() in MISTAKEN:
            raise ConfigurationError(f"{who}: the option {name!r} does nothing; use {MISTAKEN[name.lower()]}; {KNOWN}")


def refuse_without_key(who: str, names: Iterable[str]) -> None:
    """Refuse lock options, `names`, of a body that has no key.

    Raises: ConfigurationError.
    """
    useless = sorted(set(names) & set(OPTIONS) - {"lock_key"})
    if useless:
        raise ConfigurationError(
            f"{who}: {', '.join(useless)} without lock_key guards nothing; "
            'add lock_key="name:{argument}", or lock_key=True for all arguments'
        )
