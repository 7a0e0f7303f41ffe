"""`concurrency-safe run --once-per` and `--tick`, and `init`, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest

from concurrency_safe import configure
from concurrency_safe.postgres.sql import CREATE_FENCE, CREATE_TICK
from concurrency_safe.ticks import last_success
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for
from tests.integration.test_cli_run import LISTENER, PROGRAM, Run, end, run, said
from tests.settings import NO_SERVER

__all__ = ["run"]  # a fixture


@pytest.fixture(autouse=True)
def no_ticks(store: LockStore, dsn: str) -> Iterator[None]:
    """Leave no tick to the next test."""
    configure(dsn=dsn)
    yield
    store.connection.execute("TRUNCATE concurrency_safe_tick")


def test_a_period_has_one_run_and_the_others_are_a_quiet_success(run: Run, rival: Rival) -> None:
    week = f"--once-per={7 * 86400}s"
    assert end(run(week, "job", "--", "echo", "ran")) == (0, "ran\n", "")
    assert end(run("job", week, "--min-hold=60", "--", "echo", "ran")) == (0, "", "")
    assert end(run("job", "--", "echo", "ran")) == (0, "ran\n", "")
    assert end(run("other", week, "--", "echo", "ran")) == (0, "ran\n", "")
    assert rival.is_free("job")
    seen = last_success("job")
    assert seen is not None
    assert abs(seen - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_a_scheduled_time_has_one_run(run: Run) -> None:
    ticks = ["2026-03-29T01:30:00+01:00", "2026-03-29T00:30:00Z", "1774744200", "2026-03-29T01:30:00Z"]
    assert [end(run(f"--tick={tick}", "job", "--", "echo", "ran"))[1] for tick in ticks] == ["ran\n", "", "", "ran\n"]
    # An hour that begins at the scheduled time, whatever the clock says.
    assert end(run("--tick=2026-03-29T01:59:59Z", "--once-per=hour", "job", "--", "echo", "ran"))[1] == ""
    assert end(run("--tick=2026-03-29T02:00:00Z", "--once-per=hour", "job", "--", "echo", "ran"))[1] == "ran\n"


def test_a_failed_tick_is_repeated_only_on_request(run: Run) -> None:
    assert end(run("--tick=1", "job", "--", "sh", "-c", "exit 3"))[0] == 3
    assert last_success("job") is None
    assert end(run("--tick=1", "job", "--", "echo", "ran")) == (0, "", "")
    assert end(run("--tick=1", "--retry-failed-tick", "job", "--", "no-such-command"))[0] == 127
    assert end(run("--tick=1", "--retry-failed-tick", "job", "--", "echo", "ran")) == (0, "ran\n", "")
    assert end(run("--tick=1", "--retry-failed-tick", "job", "--", "echo", "ran")) == (0, "", "")


def test_a_crashed_run_is_repeated_when_its_lock_says_that_it_is_dead(run: Run, rival: Rival) -> None:
    crashed = run("--tick=1", "job", "--", *LISTENER)
    pid = int(said(crashed))
    crashed.kill()
    crashed.wait()
    again = ("--tick=1", "--retry-failed-tick", "job", "--", "echo", "ran")
    assert end(run(*again))[0] == 75  # the command lives, and so does its lock
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: rival.is_free("job"))
    assert end(run("--tick=1", "job", "--", "echo", "ran")) == (0, "", "")
    assert end(run(*again)) == (0, "ran\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--once-per=minutes"], "did you mean 'minute'?"),
        (["--tick=soon"], "tick='soon' is no point in time"),
        (["--retry-failed-tick"], "needs ticks"),
        (["--tick=1", "--slots=2"], "leave --shared and --slots out"),
        (["--tick=1", "--shared"], "leave --shared and --slots out"),
    ],
)
def test_a_wrong_option_is_an_error_of_usage(run: Run, options: list[str], message: str) -> None:
    status, out, err = end(run(*options, "job", "--", "echo", "ran"))
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def init(dsn: str) -> tuple[int, str, str]:
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn}
    answer = subprocess.run(
        [*PROGRAM[:-1], "init"], capture_output=True, text=True, env=environment, timeout=30, check=False
    )
    return answer.returncode, answer.stdout, answer.stderr


def test_init_makes_what_a_script_has_no_migration_for(run: Run, store: LockStore, dsn: str) -> None:
    store.connection.execute("DROP TABLE concurrency_safe_tick; DROP SEQUENCE concurrency_safe_fence")
    try:
        status, out, err = end(run("--tick=1", "job", "--", "echo", "ran"))
        assert (status, out) == (69, "")
        assert "concurrency-safe init" in err
        assert init(dsn) == (0, "", "")
        assert init(dsn) == (0, "", "")
        assert end(run("--tick=1", "job", "--", "echo", "ran")) == (0, "ran\n", "")
        assert store.connection.execute("SELECT nextval('concurrency_safe_fence')").fetchone() == (1,)
    finally:
        store.connection.execute(f"{CREATE_TICK}; {CREATE_FENCE}")


def test_init_needs_a_store() -> None:
    status, _, err = init(NO_SERVER)
    assert status == 69
    assert err.startswith("concurrency-safe: nothing was created: ")
