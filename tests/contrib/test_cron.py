"""Functions and management commands that run on one host; the commands in processes of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings

from concurrency_safe import ConfigurationError, LockAcquireTimeout, LockLost, LockUnavailable, assert_locked
from concurrency_safe.contrib.cron import GuardedCommand, cron_guard
from tests.contrib.cron_app.management.commands import nightly, skipping
from tests.contrib.cron_app.management.commands.plain import Command as Plain
from tests.integration.conftest import LockStore, Rival, wait_for
from tests.settings import NO_SERVER

# Functions.


def test_a_job_runs_under_its_lock(rival: Rival) -> None:
    @cron_guard("report:{shop}")
    def report(shop: str) -> str:
        assert_locked(f"report:{shop}")
        assert not rival.try_hold(f"report:{shop}")
        return shop

    assert report("a") == "a"
    assert rival.is_free("report:a")


def test_a_second_run_is_skipped_without_waiting(rival: Rival) -> None:
    ran: list[int] = []
    job = cron_guard("report")(ran.append)
    rival.hold("report")

    assert job(1) is None
    assert ran == []


def test_a_second_run_can_raise(rival: Rival) -> None:
    @cron_guard("report", on_conflict="raise")
    def report() -> None: ...

    rival.hold("report")
    with pytest.raises(LockAcquireTimeout, match="tried once"):
        report()


def test_min_hold_keeps_the_lock_after_a_short_body(rival: Rival) -> None:
    @cron_guard("report", min_hold=0.2)
    def report(error: Exception | None = None) -> float:
        if error is not None:
            raise error
        return time.monotonic()

    began = time.monotonic()
    ended = report()
    assert ended - began < 0.2 <= time.monotonic() - ended + 0.05
    assert rival.is_free("report")

    began = time.monotonic()
    with pytest.raises(ValueError, match="failed"):
        report(ValueError("failed"))
    assert time.monotonic() - began >= 0.2


def test_min_hold_is_for_late_hosts_not_for_those_who_interrupt(dsn: str) -> None:
    @cron_guard("report", min_hold=30)
    def report() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report()


def cut_sessions(store: LockStore) -> None:
    """Let the server end every lock session of this database, and wait until it has."""
    store.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'cs:%'"
    )
    wait_for(lambda: store.rows() == 0)  # they have heard it


def test_min_hold_ends_when_the_lock_is_lost(store: LockStore) -> None:
    @cron_guard("report", min_hold=30)
    def report() -> None:
        cut_sessions(store)

    @cron_guard("report", min_hold=30)
    async def areport() -> None:
        cut_sessions(store)

    with pytest.raises(LockLost):
        report()
    with pytest.raises(LockLost):
        asyncio.run(areport())


def test_min_hold_keeps_the_lock_of_a_coroutine(rival: Rival) -> None:
    @cron_guard("report", min_hold=0.2)
    async def report(error: Exception | None = None) -> float:
        assert not rival.try_hold("report")
        if error is not None:
            raise error
        return time.monotonic()

    async def alone() -> float:
        ended = await report()
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nobody waits any more for a loss
        return ended

    ended = asyncio.run(alone())
    assert time.monotonic() - ended > 0.15
    assert rival.is_free("report")

    began = time.monotonic()
    with pytest.raises(ValueError, match="failed"):
        asyncio.run(report(ValueError("failed")))
    assert time.monotonic() - began >= 0.2


def test_min_hold_waits_for_nobody_where_locks_are_switched_off(dsn: str) -> None:
    @cron_guard("report", min_hold=30)
    def report() -> int:
        return 1

    @cron_guard("report", min_hold=30)
    async def areport() -> int:
        return 2

    with override_settings(CONCURRENCY_SAFE={"ENABLED": False}):
        assert report() == 1
        assert asyncio.run(areport()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_hold": -1}, "min_hold=-1 is not a number of seconds"),
        ({"min_hold": True}, "min_hold=True"),
        ({"on_conflict": "retry"}, "needs a queue"),
        ({"timeout": "1"}, "timeout='1'"),
    ],
)
def test_bad_options_are_loud_at_decoration(options: dict[str, Any], message: str) -> None:
    def job() -> None: ...

    with pytest.raises(ConfigurationError, match=message):
        cron_guard("report", **options)(job)


def test_a_generator_is_refused_with_min_hold_too() -> None:
    def job() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match="generator"):
        cron_guard("report", min_hold=1)(job)


# Commands.


Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def manage(store: LockStore) -> Iterator[Run]:
    """Start `manage.py` with these arguments."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.contrib.cron_settings",
                "DATABASE_URL": store.url,
                **environment,
            },
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Let a command go on; give its exit status and what it said."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("command", [["guarded", "plain"], ["nightly"]])
def test_of_two_commands_one_ends_with_75(manage: Run, command: list[str]) -> None:
    first = manage(*command, "--until-eof", "a", "b")
    assert first.stdout
    assert first.stdout.readline() == "ran a b\n"

    status, out, err = end(manage(*command))
    assert (status, out) == (75, "")
    assert "is held by" in err
    assert "Traceback" not in err

    assert end(first) == (0, "", "")


def test_a_skipped_command_is_a_quiet_success(manage: Run, rival: Rival) -> None:
    rival.hold("nightly:x")
    assert end(manage("skipping")) == (0, "", "")

    status, out, err = end(manage("skipping", "--verbosity", "2"))
    assert (status, out) == (0, "")
    assert "skipped: lock 'nightly:x' is held by" in err


def test_the_exit_status_is_the_commands_own(manage: Run) -> None:
    running = [
        (manage("guarded", "plain", "--status", "42", "--lock-key", "a"), 42, ""),
        (manage("guarded", "--lock-key", "b", "plain", "--error", "43"), 43, "CommandError: of its own"),
        (manage("nightly", "--error", "44"), 44, "CommandError: of its own"),
        (manage("guarded", "plain", "--no-such-option"), 2, "unrecognized arguments: --no-such-option"),
        (manage("guarded", "plain", "--wait=soon"), 2, "is not a number of seconds"),
        (manage("guarded", "plain", "--once-per", "dya"), 2, "did you mean 'day'?"),
        (manage("guarded", "plain", "--retry-failed-tick"), 2, "give once_per as well"),
        (manage("guarded", "--lock-key", "c"), 2, "name the command"),
        (manage("guarded", "nosuchcommand"), 1, "Unknown command: 'nosuchcommand'"),
    ]
    for process, expected, message in running:
        status, _, err = end(process)
        assert status == expected
        assert message in err


def test_the_lock_key_may_stand_before_or_behind_the_command(manage: Run, rival: Rival) -> None:
    rival.hold("other")
    busy = [
        manage("guarded", "--lock-key", "other", "plain", "--shop", "s"),
        manage("guarded", "plain", "--shop", "s", "--lock-key=other"),
    ]
    free = manage("guarded", "--lock-key", "free", "plain", "--", "--", "--lock-key")
    assert [end(process)[0] for process in busy] == [75, 75]
    assert end(free) == (0, "ran --lock-key\n", "")


def test_a_command_can_wait(manage: Run, rival: Rival, store: LockStore) -> None:
    rival.hold("plain")
    waiting = manage("guarded", "--wait", "plain")
    assert end(manage("guarded", "plain", "--wait=0.01"))[0] == 75
    wait_for(store.waiting)
    rival.let_go()
    assert end(waiting) == (0, "ran\n", "")


def test_without_the_lock_store_nothing_runs(manage: Run) -> None:
    for process in (manage("guarded", "plain", DATABASE_URL=NO_SERVER), manage("nightly", DATABASE_URL=NO_SERVER)):
        status, out, err = end(process)
        assert (status, out) == (69, "")
        assert "CommandError: not run: the lock store can't be reached" in err


def test_a_lost_lock_is_told_by_76(manage: Run, store: LockStore) -> None:
    process = manage("nightly", "--until-eof")
    assert process.stdout
    process.stdout.readline()
    cut_sessions(store)
    status, _, err = end(process)
    assert status == 76
    assert "was lost while it was held" in err


@pytest.mark.parametrize("arguments", [["nightly"], ["guarded", "plain"]])
def test_a_lost_lock_is_told_also_when_the_command_exits_with_success(
    manage: Run, store: LockStore, arguments: list[str]
) -> None:
    for code, expected in ((0, 76), (3, 3)):  # a failure says more
        process = manage(*arguments, "--until-eof", "--status", str(code))
        assert process.stdout
        process.stdout.readline()
        cut_sessions(store)
        status, _, err = end(process)
        assert status == expected
        assert expected != 76 or "was lost while it was held" in err


def test_an_empty_lock_key_is_refused() -> None:
    with pytest.raises(CommandError, match="--lock-key is empty") as caught:
        call_command("guarded", "check", lock_key="")
    assert caught.value.returncode == 2


def test_call_command_may_wait_for_ever(dsn: str) -> None:
    out = StringIO()
    call_command("guarded", "check", wait=None, stdout=out)
    assert "no issues" in out.getvalue()


def test_call_command_raises_with_the_return_code(rival: Rival) -> None:
    rival.hold("nightly:x")
    rival.hold("clearsessions")
    with pytest.raises(CommandError) as caught:
        call_command(nightly.Command())
    assert caught.value.returncode == 75
    with pytest.raises(CommandError) as caught:
        call_command("guarded", "clearsessions")
    assert caught.value.returncode == 75
    assert call_command(skipping.Command()) is None


def test_call_command_gives_the_output(dsn: str) -> None:
    out = StringIO()
    call_command("guarded", "check", stdout=out)
    call_command(nightly.Command(), "word", shop="y", stdout=out)
    assert out.getvalue() == "System check identified no issues (0 silenced).\nran word\n"


@pytest.mark.parametrize("error", [LockAcquireTimeout("of the body"), LockUnavailable("of the body")])
def test_a_lock_error_of_the_body_is_the_bodys_own(dsn: str, error: Exception) -> None:
    class Command(GuardedCommand):
        lock_key = "own"

        def handle(self, *_args: object, **_options: object) -> None:
            raise error

    with pytest.raises(type(error)) as caught:
        call_command(Command())
    assert caught.value is error


@pytest.mark.parametrize("key", [None, True])
def test_a_command_needs_a_key(key: object) -> None:
    class Command(GuardedCommand, Plain):
        lock_key = key

    with pytest.raises(ConfigurationError, match=r"lock_key = \"test_cron:\{shop\}\""):
        call_command(Command())


def test_a_key_may_be_a_method(rival: Rival) -> None:
    class Command(GuardedCommand, Plain):
        def lock_key(self, *_args: object, shop: str, **_options: object) -> str:
            return f"by-method:{shop}"

    rival.hold("by-method:z")
    with pytest.raises(CommandError, match="'by-method:z' is held by"):
        call_command(Command(), shop="z")
