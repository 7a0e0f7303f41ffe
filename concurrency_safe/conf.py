"""Settings: Django's CONCURRENCY_SAFE, `configure()` and the environment become one frozen `Settings`.

What is nearer wins: a call's own argument (not here), `configure()`, Django's settings, the environment, the default.
Importing this imports no Django.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from concurrency_safe.core.errors import ConfigurationError
from concurrency_safe.core.options import check_count, check_timeout, is_number
from concurrency_safe.core.suggest import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The library's settings, checked.

    Args:
        using: The Django alias whose database holds the locks.
        dsn: The lock store, where it is not that alias' database address; None: the alias.
        timeout: Seconds that `lock()` waits by default; 0: one try; None: for ever.
        namespace: Part of every key: two namespaces share no lock.
        pool_size: Most sessions kept in a process; the locks that it holds share them.
        pool_idle: Seconds that an idle session is kept.
        pooler: None, or "transaction" for a pooler in that mode: a lock is an open transaction then.
        max_held: Most locks held at once in a process.
        max_block: Seconds that one wait blocks in the server before it queues again.
        fencing: Whether locks have tokens that rise with every acquisition; it needs a sequence.
        on_lost: "raise" or "log": what the end of a block does when its lock went away.
        enabled: False: `lock()` takes nothing (for tests).

    Raises: ConfigurationError.
    """

    using: str = "default"
    dsn: str | None = field(default=None, repr=False)  # it may hold a password
    timeout: float | None = 3.0
    namespace: str = ""
    pool_size: int = 4
    pool_idle: float = 60.0
    pooler: str | None = None
    max_held: int = 1000
    max_block: float = 10.0
    fencing: bool = False
    on_lost: str = "raise"
    enabled: bool = True

    def __post_init__(self) -> None:
        """Check every value once."""
        check_timeout("the setting TIMEOUT", self.timeout)
        check_count("the setting POOL_SIZE", self.pool_size, at_least=0)
        check_count("the setting MAX_HELD", self.max_held, at_least=1)
        _require("pool_idle", self.pool_idle, is_number(self.pool_idle, at_least=0), "a number of seconds >= 0")
        blocks = is_number(self.max_block, at_least=0) and self.max_block > 0
        _require("max_block", self.max_block, blocks, "a number of seconds > 0")
        for name in ("using", "namespace"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        _require("using", self.using, bool(self.using), "the name of a database alias")
        _require("namespace", self.namespace, _has_bytes(self.namespace), "a text that has bytes in UTF-8")
        _require(
            "dsn",
            "***",
            self.dsn is None or (isinstance(self.dsn, str) and bool(self.dsn)),
            "a DSN or None",
        )
        for name in ("fencing", "enabled"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _require("on_lost", self.on_lost, self.on_lost in ("raise", "log"), "'raise' or 'log'")
        _require("pooler", self.pooler, self.pooler in (None, "transaction"), "None or 'transaction'")


def _require(name: str, value: object, holds: bool, allowed: str) -> None:  # noqa: FBT001 - the fact itself
    if not holds:
        raise ConfigurationError(f"the setting {name.upper()}={value!r} is not {allowed}")


def _has_bytes(text: str) -> bool:
    """Say whether `text` has no lone surrogate; bytes of the environment that are no UTF-8 come as such."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


_NAMES = tuple(each.name for each in fields(Settings))


@dataclass(slots=True)
class _State:
    """What is known between two changes; who reads while one happens fills a state that nobody will see."""

    configured: dict[str, Any]
    settings: Settings | None = None
    with_django: bool = False


_state = _State({})
_listening = False


def configure(**settings: Any) -> None:
    """Set the library up in a script, or override Django's CONCURRENCY_SAFE in this process.

    Takes the settings as keyword arguments in lower case: `configure(dsn="postgresql://...", timeout=1.0)`. What was
    configured before, and is not named, stays.

    Raises: ConfigurationError: an unknown name, or a bad value; nothing is changed then.
    """
    global _state  # noqa: PLW0603 - one set of settings a process
    for name in settings:
        if name not in _NAMES:
            raise ConfigurationError(f"configure() has no setting {name!r}{nearest(name, _NAMES)}")
    wanted = {**_state.configured, **settings}
    Settings(**wanted)
    _state = _State(wanted)


def reset() -> None:
    """Forget what `configure()` was told."""
    global _state  # noqa: PLW0603 - one set of settings a process
    _state = _State({})


def get_settings() -> Settings:
    """Give the settings in force.

    Raises: ConfigurationError: a name or a value in them is bad.
    """
    state = _state
    # A script may configure Django after its first lock.
    if state.settings is None or (not state.with_django and "django.conf" in sys.modules and django_is_configured()):
        state.with_django = django_is_configured()
        state.settings = Settings(**{**_from_environment(), **_from_django(), **state.configured})
    return state.settings


def django_is_configured() -> bool:
    """Say whether this process runs Django: its settings are there, or named by DJANGO_SETTINGS_MODULE."""
    # Another thread may be importing it, so that it has no settings yet.
    settings = getattr(sys.modules.get("django.conf"), "settings", None)
    if settings is not None and settings.configured:
        return True
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def uses_django() -> bool:
    """Say the same, at once where it is known to be so."""
    return _state.with_django or django_is_configured()


def _from_environment() -> dict[str, Any]:
    given: dict[str, Any] = {}
    if namespace := os.environ.get("CONCURRENCY_SAFE_NAMESPACE"):
        given["namespace"] = namespace
    dsn = os.environ.get("CONCURRENCY_SAFE_DSN")
    if not dsn and not django_is_configured():
        dsn = os.environ.get("DATABASE_URL")
    if dsn:
        given["dsn"] = dsn
    return given


def _from_django() -> dict[str, Any]:
    if not django_is_configured():
        return {}
    from django.conf import settings

    _listen()
    given = getattr(settings, "CONCURRENCY_SAFE", {})
    if not isinstance(given, dict):
        raise ConfigurationError(f"settings.CONCURRENCY_SAFE is a {type(given).__name__}; it must be a dict")
    known = [name.upper() for name in _NAMES]
    for name in given:
        if name not in known:
            raise ConfigurationError(f"settings.CONCURRENCY_SAFE has no key {name!r}{nearest(name, known)}")
    return {name.lower(): value for name, value in given.items()}


def _listen() -> None:
    """Read the settings anew when a test overrides them."""
    global _listening  # noqa: PLW0603 - once a process
    if not _listening:
        from django.core.signals import setting_changed

        setting_changed.connect(_forget, dispatch_uid="concurrency_safe.conf")
        _listening = True


def _forget(*, setting: str, **_: object) -> None:
    global _state  # noqa: PLW0603 - one set of settings a process
    if setting == "CONCURRENCY_SAFE":
        _state = _State(_state.configured)
