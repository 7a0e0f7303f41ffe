"""Options of a guarded task: a mistake stops the worker, with the right name in its message."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task

from concurrency_safe import (
    ConfigurationError,
    KeyTemplateError,
    LockAcquireTimeout,
    Retry,
    assert_locked,
    current_lock,
)
from concurrency_safe.contrib.celery import ConcurrencySafeMixin, ConcurrencySafeTask
from concurrency_safe.contrib.celery.task import guard_of, mistake_of
from tests.integration.conftest import Rival

GUARDED = {"base": ConcurrencySafeTask, "name": "pay"}


def declare(app: Celery | None = None, **options: Any) -> Any:
    """Declare a task `pay(user_id, amount=0)` in an app of its own, and finalize the app as a worker's start does."""
    mine: Any = app or Celery("mine", set_as_current=False, broker="memory://")

    def pay(user_id: int, amount: int = 0) -> str:
        assert_locked()
        held = current_lock()
        assert held is not None
        return held.keys[0]

    mine.task(shared=False, **{**GUARDED, **options})(pay)
    mine.finalize()
    return mine.tasks["pay"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lock_key": "pay:{uid}"}, r"task pay: .*'pay:\{uid\}'.*'uid'.*'user_id', 'amount'"),
        ({"lock_key": "pay:{}"}, "task pay: .*by position"),
        ({"lock_key": ""}, "task pay: "),
        ({"lock_key": 7}, "task pay: key=7"),
        ({"key": "pay:{user_id}"}, "'key' does nothing; use lock_key"),
        ({"once": True}, "'once' does nothing; use lock_key"),
        ({"unique_on": ["user_id"]}, "'unique_on' does nothing; use lock_key"),
        ({"timeout": 3}, "'timeout' does nothing; use lock_timeout"),
        ({"slots": 2}, "'slots' does nothing; use lock_slots"),
        ({"scope": "session"}, "'scope' does nothing"),
        ({"lock_kee": "x"}, "no option 'lock_kee' .did you mean 'lock_key'"),
        ({"lock_key": None, "lock_timeout": 1}, "lock_timeout without lock_key guards nothing"),
        ({"lock_timeout": -1}, "task pay: .*timeout=-1"),
        ({"on_conflict": "retri"}, "did you mean 'retry'"),
        ({"on_conflict": ValueError}, "task pay: .*ValueError is a class"),
        ({"lock_shared": 1}, "task pay: .*shared=1"),
        ({"lock_slots": 0}, "task pay: .*slots=0"),
        ({"on_conflct": "skip"}, "no option 'on_conflct' .did you mean 'on_conflict'"),
        ({"lockKey": "pay:{user_id}"}, "no option 'lockKey' .did you mean 'lock_key'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_an_error_when_the_app_is_finalized(options: dict[str, Any], says: str) -> None:
    app: Any = Celery("mine", set_as_current=False, broker="memory://")
    with pytest.raises((ConfigurationError, KeyTemplateError), match=says):
        declare(app, **options)

    assert "pay" not in app._tasks  # no second access finds the invalid task


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, 'pay{"amount":0,"user_id":7}'),
        ({"lock_key": "pay:{user_id}"}, "pay:7"),
        ({"lock_key": ("pay", "{user_id}")}, "(pay/7)"),
        ({"lock_key": lambda user_id, amount=0: f"{user_id}-{amount}"}, "7-0"),
    ],
    ids=["left out", "template", "tuple", "callable"],
)
@pytest.mark.parametrize("how", ["direct", "apply", "always eager"])
def test_direct_and_eager_calls_take_the_lock(options: dict[str, Any], key: str, how: str, rival: Rival) -> None:
    task = declare(**options)
    task.app.conf.task_always_eager = how == "always eager"
    task.app.conf.task_store_eager_result = False

    result = task(7) if how == "direct" else (task.apply((7,)) if how == "apply" else task.delay(user_id=7)).get()

    assert result == key


@pytest.mark.parametrize("how", ["direct", "apply"])
def test_where_no_queue_stands_behind_a_call_retry_raises(how: str, rival: Rival) -> None:
    task = declare(lock_key="pay:{user_id}", on_conflict=Retry(limit=None))
    rival.hold("pay:7")

    with pytest.raises(LockAcquireTimeout, match="pay:7"):
        task(7) if how == "direct" else task.apply((7,)).get()


def test_wrong_arguments_are_the_bodys_own_error(rival: Rival) -> None:
    task = declare(lock_key="pay:{user_id}", typing=False)
    with pytest.raises(TypeError, match="user_id"):
        task.apply(()).get()


def test_a_missing_value_never_runs_the_body(rival: Rival) -> None:
    task = declare(lock_key="pay:{user_id}")
    with pytest.raises(KeyTemplateError, match="None"):
        task.apply((None,)).get()


@pytest.mark.parametrize("base", [ConcurrencySafeTask, type("Own", (ConcurrencySafeMixin, Task), {"abstract": True})])
@pytest.mark.parametrize("how", ["task_cls", "app.Task"])
def test_as_the_base_of_an_app_it_guards_only_tasks_with_a_key(base: Any, how: str, rival: Rival) -> None:
    app: Any = Celery("mine", set_as_current=False, broker="memory://", task_cls=base if how == "task_cls" else None)
    if how == "app.Task":
        app.Task = base

    @app.task(shared=False, name="free")  # type: ignore[untyped-decorator]  # any app
    def free() -> object:
        return current_lock()

    task = declare(app, base=None, lock_key="pay:{user_id}")

    assert app.tasks["free"]() is None
    assert guard_of(app.tasks["celery.backend_cleanup"]) is None
    assert task(7) == "pay:7"


@pytest.mark.parametrize("how", ["task_cls", "app.Task"])
def test_the_options_of_an_app_wide_base_guard_nothing_of_celerys_own(how: str) -> None:
    class Ours(ConcurrencySafeMixin, Task):  # type: ignore[type-arg]  # any arguments
        abstract = True
        lock_key = "pay:{user_id}"

    app: Any = Celery("mine", set_as_current=False, broker="memory://", task_cls=Ours if how == "task_cls" else None)
    if how == "app.Task":
        app.Task = Ours
    declare(app, base=None)

    theirs = [task for name, task in app.tasks.items() if name.startswith("celery.")]
    assert len(theirs) > 5
    assert [task.name for task in theirs if guard_of(task) is not None] == []


@pytest.mark.parametrize("how", ["task_cls", "app.Task"])
def test_a_mistake_in_an_app_wide_base_is_found(how: str) -> None:
    class Ours(ConcurrencySafeMixin, Task):  # type: ignore[type-arg]  # any arguments
        abstract = True
        lock_kee = True

    app: Any = Celery("mine", set_as_current=False, broker="memory://", task_cls=Ours if how == "task_cls" else None)
    if how == "app.Task":
        app.Task = Ours
    with pytest.raises(ConfigurationError, match="did you mean 'lock_key'"):
        declare(app, base=None)


@pytest.mark.parametrize("how", ["task_cls", "app.Task", "neither"])
def test_options_may_come_from_a_mix_in_that_knows_nothing_of_us(how: str, rival: Rival) -> None:
    class Keyed:
        lock_key = "pay:{user_id}"

    class Base(Keyed, ConcurrencySafeTask):
        abstract = True

    app: Any = Celery(
        "mine", set_as_current=False, broker="memory://", task_cls=ConcurrencySafeTask if how == "task_cls" else None
    )
    if how == "app.Task":
        app.Task = ConcurrencySafeTask

    assert declare(app, base=Base)(7) == "pay:7"


def test_an_option_of_a_base_without_a_key_is_refused_where_the_app_has_our_base() -> None:
    class Base(ConcurrencySafeTask):
        abstract = True
        on_conflict = "skip"

    app: Any = Celery("mine", set_as_current=False, broker="memory://")
    app.Task = ConcurrencySafeTask
    with pytest.raises(ConfigurationError, match="on_conflict without lock_key guards nothing"):
        declare(app, base=Base)


def test_a_class_with_a_constructor_of_its_own_is_guarded(rival: Rival) -> None:
    """As Celery's manual shows one: it calls no other."""

    class Pay(ConcurrencySafeTask):
        name = "pay"
        lock_key = "pay:{user_id}"

        def __init__(self) -> None:
            self.users: dict[int, str] = {}

        def run(self, user_id: int) -> tuple[str, ...]:
            assert_locked(f"pay:{user_id}")
            return self.lock.keys if self.lock is not None else ()

    class Wrong(Pay):
        name = "wrong"
        lock_key = "pay:{uid}"

    app: Any = Celery("mine", set_as_current=False, broker="memory://")
    app.register_task(Pay())
    app.register_task(Wrong())
    app.finalize()

    assert app.tasks["pay"](7) == ("pay:7",)
    assert mistake_of(app.tasks["pay"]) is None
    assert "'uid'" in str(mistake_of(app.tasks["wrong"]))
    with pytest.raises(KeyTemplateError, match="uid"):
        app.tasks["wrong"](7)


def test_options_may_come_from_celerys_annotations(rival: Rival) -> None:
    app: Any = Celery("mine", set_as_current=False, broker="memory://", task_cls=ConcurrencySafeTask)
    app.conf.task_annotations = {"pay": {"lock_key": "pay:{user_id}", "on_conflict": "skip"}}
    task = declare(app, base=None)

    assert task(7) == "pay:7"
    rival.hold("pay:8")
    assert task(8) is None


def test_a_wrong_annotation_never_runs_the_body(rival: Rival) -> None:
    app: Any = Celery("mine", set_as_current=False, broker="memory://", task_cls=ConcurrencySafeTask)
    app.conf.task_annotations = {"pay": {"lock_key": "pay:{uid}"}}
    task = declare(app, base=None)

    assert "'uid'" in str(mistake_of(task))
    with pytest.raises(KeyTemplateError, match="uid"):
        task(7)


def test_one_class_that_a_task_throws_is_as_good_as_a_tuple(rival: Rival) -> None:
    assert guard_of(task := declare(throws=ValueError)) is not None
    assert task.throws == (ValueError, LockAcquireTimeout)


async def _later(user_id: int) -> int:
    return user_id


def _one_by_one(user_id: int) -> Iterator[int]:
    yield user_id


async def _one_by_one_later(user_id: int) -> AsyncIterator[int]:
    yield user_id


@pytest.mark.parametrize("body", [_later, _one_by_one, _one_by_one_later])
def test_a_body_that_a_call_does_not_run_is_refused(body: Callable[..., object]) -> None:
    app: Any = Celery("mine", set_as_current=False, broker="memory://")
    app.task(shared=False, **GUARDED)(body)
    with pytest.raises(ConfigurationError, match="task pay: its body is a"):
        app.finalize()


def test_delay_on_commit_is_kept() -> None:
    """Celery has it since 5.4."""
    assert hasattr(declare(), "delay_on_commit") == hasattr(declare(base=None), "delay_on_commit")


def test_a_base_that_comes_before_the_guard_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Bypass(ConcurrencySafeTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    declare(base=Bypass)

    assert "Bypass.__call__ comes before the guard's" in caplog.text


WORKER = """
from celery import Celery
from concurrency_safe.contrib.celery import ConcurrencySafeTask
app = Celery("bad", broker="memory://")

@app.task(name="pay"{options})
def pay(user_id): ...
"""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (', base=ConcurrencySafeTask, lock_key="pay:{uid}"', "task pay: key template 'pay:{uid}'"),
        (', base=ConcurrencySafeTask, key="pay"', "task pay: the option 'key' does nothing; use lock_key"),
        (', lock_key="pay:{user_id}"', "task pay: lock_key without base=ConcurrencySafeTask guards nothing"),
    ],
    ids=["bad template", "bad option", "no base"],
)
def test_a_worker_with_a_mistake_does_not_start(options: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(WORKER.replace("{options}", options))
    command = [sys.executable, "-m", "celery", "-A", "bad", "worker", "-c", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=50)

    assert ran.returncode == 1
    assert says in ran.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert "ready." not in ran.stderr
