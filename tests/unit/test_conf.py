"""Settings: where they come from, and what an error says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from concurrency_safe import ConfigurationError, configure
from concurrency_safe.conf import Settings, get_settings, reset


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    reset()
    yield
    reset()


def test_the_nearer_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCURRENCY_SAFE_NAMESPACE", "environment")
    monkeypatch.setenv("CONCURRENCY_SAFE_DSN", "postgresql://environment")
    reset()
    assert get_settings().namespace == "environment"
    assert get_settings().dsn == "postgresql://environment"

    with override_settings(CONCURRENCY_SAFE={"NAMESPACE": "django", "TIMEOUT": 1}):
        assert get_settings().namespace == "django"
        assert get_settings().timeout == 1
        configure(namespace="configured")
        assert get_settings().namespace == "configured"
        assert get_settings().timeout == 1
        configure(timeout=None)
        assert get_settings().namespace == "configured"
        assert get_settings().timeout is None
    reset()
    assert get_settings().namespace == "environment"
    with override_settings(LANGUAGE_CODE="es"):
        assert get_settings().namespace == "environment"


def test_a_bad_configure_changes_nothing() -> None:
    configure(timeout=1)
    with pytest.raises(ConfigurationError, match="did you mean 'timeout'"):
        configure(timeot=2)
    with pytest.raises(ConfigurationError, match="TIMEOUT=-1"):
        configure(timeout=-1, namespace="x")

    assert get_settings() == Settings(timeout=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"TIMEOT": 1}, "no key 'TIMEOT' .did you mean 'TIMEOUT'"),
        ([], "must be a dict"),
        ({"timeout": 1}, "no key 'timeout' .did you mean 'TIMEOUT'"),
        ({"ON_LOST": "shrug"}, "ON_LOST"),
    ],
    ids=repr,
)
def test_a_mistake_in_djangos_settings_is_named(given: Any, says: str) -> None:
    with override_settings(CONCURRENCY_SAFE=given), pytest.raises(ConfigurationError, match=says):
        get_settings()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("timeout", "3"),
        ("pool_size", -1),
        ("pool_idle", None),
        ("max_block", 0),
        ("max_block", None),
        ("max_held", 0),
        ("using", ""),
        ("using", None),
        ("namespace", None),
        ("namespace", "half \ud800"),
        ("dsn", ""),
        ("dsn", 7),
        ("fencing", 1),
        ("enabled", "no"),
        ("on_lost", "shrug"),
        ("pooler", "session"),
    ],
)
def test_a_bad_value_names_its_setting(setting: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"the setting {setting.upper()}="):
        Settings(**{setting: value})


def in_script(code: str) -> str:
    """Run `code` in a process that knows nothing of Django."""
    ours = ("DJANGO_SETTINGS_MODULE", "DATABASE_URL", "CONCURRENCY_SAFE_DSN")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_script_reads_database_url_last() -> None:
    code = (
        "import os; from concurrency_safe.conf import get_settings, reset\n"
        "print(get_settings().dsn)\n"
        "os.environ['DATABASE_URL'] = 'postgresql://a'; reset(); print(get_settings().dsn)\n"
        "os.environ['CONCURRENCY_SAFE_DSN'] = 'postgresql://b'; reset(); print(get_settings().dsn)"
    )

    assert in_script(code).split() == ["None", "postgresql://a", "postgresql://b"]


def test_importing_the_library_imports_no_django() -> None:
    assert in_script("import sys, concurrency_safe; print('django' in sys.modules)") == "False"


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Settings(dsn="postgresql://me:secret@host/db"))


def test_seconds_that_must_end_do_not_offer_for_ever() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(pool_idle=-1.0)

    assert str(caught.value) == "the setting POOL_IDLE=-1.0 is not a number of seconds >= 0"


def test_django_that_is_configured_late_is_heard() -> None:
    code = (
        "from concurrency_safe.conf import get_settings; get_settings()\n"
        "from django.conf import settings; settings.configure(CONCURRENCY_SAFE={'TIMEOUT': 7})\n"
        "print(get_settings().timeout)"
    )

    assert in_script(code) == "7"


class Slow(float):
    """A number of seconds that is being checked when somebody else calls `configure()`."""

    __slots__ = ()

    def __ge__(self, other: float) -> bool:
        reset()
        configure(namespace="newer")
        return super().__ge__(other)


def test_a_configure_during_a_reading_is_not_lost() -> None:
    """What was read before `configure()` must not be kept after it."""
    with override_settings(CONCURRENCY_SAFE={"TIMEOUT": Slow(7)}):
        assert get_settings().namespace == ""

        assert get_settings().namespace == "newer"
