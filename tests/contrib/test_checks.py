"""`manage.py check` finds what would stop a worker, or leave a project without locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
import sys, types
import django
from celery import Celery
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "nowhere"}},
    INSTALLED_APPS=["concurrency_safe"],
    SECRET_KEY="x" * 60,
    **SETTINGS,
)
from concurrency_safe.contrib.celery import ConcurrencySafeTask
app = Celery("project", broker="memory://")
app.set_default()

@app.task(name="pay"OPTIONS)
def pay(user_id): ...

django.setup()
from django.core.management import call_command
call_command("check", *sys.argv[1:])
"""


def check(*arguments: str, options: str = "", settings: str = "{}") -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    program = PROJECT.replace("OPTIONS", options).replace("SETTINGS", settings)
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    return ran.returncode, ran.stderr


def test_a_sound_project_passes() -> None:
    status, said = check(options=', base=ConcurrencySafeTask, lock_key="pay:{user_id}"')

    assert status == 0, said


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        (', base=ConcurrencySafeTask, lock_key="pay:{uid}"', "{}", "E010.*task pay: key template 'pay:{uid}'"),
        (', lock_key="pay:{user_id}"', "{}", "E011.*task pay: lock_key without base=ConcurrencySafeTask"),
        ("", '{"CONCURRENCY_SAFE": {"TIMEOT": 1}}', "E001.*'TIMEOT'.*'TIMEOUT'"),
        ("", '{"CONCURRENCY_SAFE": {"USING": "other"}}', "E001.*'other'"),
    ],
    ids=["bad template", "no base", "typo", "unknown alias"],
)
def test_a_mistake_is_found(options: str, settings: str, says: str) -> None:
    status, said = check(options=options, settings=settings)

    first, _, second = says.partition(".*")
    assert status != 0
    assert f"concurrency_safe.{first}" in said
    assert all(part in said for part in second.split(".*"))


def test_switched_off_locks_are_an_error_at_deployment() -> None:
    status, said = check("--deploy", settings='{"CONCURRENCY_SAFE": {"ENABLED": False}}')

    assert status != 0
    assert "concurrency_safe.E002" in said


def test_a_worker_of_a_django_project_starts_only_without_mistakes(tmp_path: Path) -> None:
    """Celery runs Django's checks at a worker's start, and passes over their messages."""
    (tmp_path / "project.py").write_text(
        "import os\n"
        "os.environ['DJANGO_SETTINGS_MODULE'] = 'tests.settings'\n"
        "from celery import Celery\n"
        "from concurrency_safe.contrib.celery import ConcurrencySafeTask\n"
        "app = Celery('project', broker='memory://')\n"
        "@app.task(name='pay', base=ConcurrencySafeTask, lock_key='pay:{uid}')\n"
        "def pay(user_id): ...\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "project", "worker", "-c", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=50)

    assert ran.returncode == 1
    assert "task pay: key template 'pay:{uid}'" in ran.stderr.strip().splitlines()[-1]


def test_the_check_of_a_project_with_celery_ends() -> None:
    """Importing the tasks makes Celery run all checks again."""
    command = [sys.executable, "-c", "import example.celery; from example.manage import main; main()", "check"]
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "example.settings"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=50)

    assert ran.returncode == 0, ran.stderr
