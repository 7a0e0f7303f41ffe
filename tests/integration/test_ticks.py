"""Once per tick, by a clock of the database that the tests set: hosts whose clocks differ, days of DST, crashes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from io import StringIO
from typing import Any, cast
from zoneinfo import ZoneInfo

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from psycopg.conninfo import make_conninfo

from concurrency_safe import ConfigurationError, LockLost, LockUnavailable, configure, current_lock
from concurrency_safe.contrib.cron import GuardedCommand, cron_guard, last_success
from concurrency_safe.postgres.sql import CREATE_TICK
from concurrency_safe.ticks import create_tables
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for

SKEW = timedelta(milliseconds=80)
BERLIN = ZoneInfo("Europe/Berlin")
START = datetime(2026, 3, 1, tzinfo=timezone.utc)


class Clock:
    """What `clock_timestamp()` says to sessions of `dsn`, whose search_path finds ours before PostgreSQL's."""

    def __init__(self, store: LockStore) -> None:
        self._store = store
        self.dsn = make_conninfo(store.dsn, options="-c search_path=sim,pg_catalog,public")
        store.connection.execute(
            "CREATE SCHEMA sim; CREATE TABLE sim.clock AS SELECT now() AS time; CREATE TABLE sim.runs (host int);"
            "CREATE FUNCTION sim.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT time FROM sim.clock'"
        )
        self.set(START)

    def set(self, moment: datetime) -> None:
        self._store.connection.execute("UPDATE sim.clock SET time = %s", [moment])

    def runs(self) -> int:
        """Count what the hosts' jobs have written."""
        row = self._store.connection.execute("SELECT count(*) FROM sim.runs").fetchone()
        assert row
        return int(row[0])

    def forget(self) -> None:
        self._store.connection.execute("TRUNCATE sim.runs, concurrency_safe_tick")

    def close(self) -> None:
        self._store.connection.execute("DROP SCHEMA sim CASCADE; TRUNCATE concurrency_safe_tick")


@pytest.fixture
def clock(store: LockStore) -> Iterator[Clock]:
    """Set the database's clock; the library of this process lives by it, too."""
    clock = Clock(store)
    configure(dsn=clock.dsn)
    yield clock
    clock.close()


class Host:
    """A process that runs the job when it is told to, on a connection of its own."""

    def __init__(self, dsn: str, once_per: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.tick_host", dsn, once_per],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=bare_environment(),
        )

    def start_job(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def await_job(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == "over\n"

    def close(self) -> None:
        with self._process:
            self._process.kill()


def run_100_ticks(clock: Clock, once_per: str, period: timedelta) -> int:
    """Let two hosts start a job 100 times, one 80 ms early and one 80 ms late, each in turn; count its runs."""
    hosts = [Host(clock.dsn, once_per) for _ in range(2)]
    try:
        for number in range(100):
            due = START + number * period
            early, late = hosts if number % 2 else reversed(hosts)
            for host, moment in ((early, due - SKEW), (late, due + SKEW)):
                clock.set(moment)
                host.start_job()
                host.await_job()
    finally:
        for host in hosts:
            host.close()
    return clock.runs()


@pytest.mark.parametrize(
    ("once_per", "period"),
    [("minute", timedelta(minutes=1)), ("1s", timedelta(seconds=1))],
)
def test_two_hosts_with_skewed_clocks_run_100_ticks_100_times(clock: Clock, once_per: str, period: timedelta) -> None:
    assert run_100_ticks(clock, once_per, period) == 100


def test_without_ticks_a_short_job_runs_on_both_hosts(clock: Clock) -> None:
    assert run_100_ticks(clock, "", timedelta(minutes=1)) == 200


def test_hosts_that_start_at_the_same_moment_run_each_tick_once(clock: Clock) -> None:
    hosts = [Host(clock.dsn, "minute") for _ in range(3)]
    try:
        for number in range(15):
            clock.set(START + timedelta(minutes=number))
            for host in hosts:
                host.start_job()
            for host in hosts:
                host.await_job()
        assert clock.runs() == 15
    finally:
        for host in hosts:
            host.close()


def counted(clock: Clock, once_per: str, moments: list[datetime]) -> int:
    """Start a job at these moments, 80 ms early and 80 ms late; count its runs."""
    clock.forget()
    runs: list[int] = []
    job = cron_guard("job", once_per=once_per)(runs.append)
    for moment in moments:
        for skewed in (moment - SKEW, moment + SKEW):
            clock.set(skewed.astimezone(timezone.utc))
            job(1)
    return len(runs)


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 29, 23), (10, 25, 25), (7, 1, 24)])
def test_an_hourly_job_runs_once_in_each_hour_that_a_day_has(clock: Clock, month: int, day: int, hours: int) -> None:
    begin = datetime(2026, month, day, tzinfo=BERLIN).astimezone(timezone.utc)
    end = datetime(2026, month, day + 1, tzinfo=BERLIN).astimezone(timezone.utc)
    moments = [begin + timedelta(hours=number) for number in range(48)]
    moments = [moment for moment in moments if moment < end]
    assert counted(clock, "hour", moments) == len(moments) == hours


@pytest.mark.parametrize(("month", "first"), [(3, 26), (10, 22)])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "UTC"])
def test_a_daily_job_runs_once_a_day_whatever_its_local_time(clock: Clock, month: int, first: int, zone: str) -> None:
    for half_hours in range(0, 48, 3):
        time = (half_hours // 2, half_hours % 2 * 30)
        moments = [datetime(2026, month, first + day, *time, tzinfo=ZoneInfo(zone)) for day in range(6)]
        assert counted(clock, "day", moments) == 6, time


def test_a_daily_job_that_is_started_again_on_the_same_day_does_nothing(clock: Clock) -> None:
    nine = START + timedelta(hours=9)
    assert counted(clock, "day", [nine, nine + timedelta(hours=5), nine + timedelta(hours=14)]) == 1
    assert counted(clock, "day", [nine + timedelta(hours=14), nine + timedelta(days=1)]) == 2


def test_a_daily_job_that_is_started_every_hour_runs_once_a_day(clock: Clock) -> None:
    assert counted(clock, "day", [START + timedelta(hours=number) for number in range(72)]) == 3


@pytest.mark.parametrize(("once_per", "step"), [("hour", 300), ("900s", 60), ("minute", 5), ("90s", 30)])
def test_a_job_that_is_started_often_runs_once_in_each_period(clock: Clock, once_per: str, step: int) -> None:
    starts = [START + timedelta(seconds=second) for second in range(0, 7200, step)]
    seconds = {"hour": 3600, "900s": 900, "minute": 60, "90s": 90}[once_per]
    assert counted(clock, once_per, starts) in {7200 // seconds, 7200 // seconds + 1}  # the last may round up


# One tick.


def test_a_run_that_is_skipped_gives_none_whatever_the_policy(clock: Clock, rival: Rival) -> None:
    @cron_guard("job", once_per="hour", on_conflict="raise", min_hold=0.01)
    def job() -> str:
        assert not rival.try_hold("job")
        return "ran"

    assert [job(), job()] == ["ran", None]
    assert rival.is_free("job")


def test_a_coroutine_runs_once_per_tick(clock: Clock) -> None:
    @cron_guard("job", once_per="hour")
    async def job() -> str:
        await asyncio.sleep(0)
        return "ran"

    async def twice() -> list[str]:
        return [await job(), await job()]

    assert asyncio.run(twice()) == ["ran", None]
    assert last_success("job") == START


def test_a_command_runs_once_per_tick(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    class Command(GuardedCommand):
        lock_key = "report"
        once_per = "day"

        def handle(self, *_args: object, **_options: object) -> str:
            return "ran"

    class Stubborn(Command):
        retry_failed_tick = True

        def handle(self, *_args: object, **_options: object) -> str:
            raise CommandError("of its own")

    out, err = StringIO(), StringIO()
    with caplog.at_level("INFO", "concurrency_safe"):
        for command in (Command(), Command(), Stubborn()):
            call_command(command, verbosity=2, stdout=out, stderr=err)
    assert out.getvalue() == "ran\n"
    assert err.getvalue() == "skipped: it was run in this period already\n" * 2
    assert caplog.messages == ["the tick of 'report' was run already"] * 2

    clock.set(START + timedelta(days=1))
    for _ in range(2):
        with pytest.raises(CommandError, match="of its own"):
            call_command(Stubborn())
    call_command(Command(), stdout=out)  # asks for no second run of a tick that failed
    assert out.getvalue() == "ran\n"


def test_any_command_can_be_run_once_per_tick(clock: Clock) -> None:
    out = StringIO()
    for _ in range(2):
        call_command("guarded", "--once-per=day", "check", stdout=out)
    clock.set(START + timedelta(days=1))
    call_command("guarded", "--once-per", "day", "--retry-failed-tick", "check", stdout=out)
    assert out.getvalue() == "System check identified no issues (0 silenced).\n" * 2
    for wrong in (["--once-per=dya", "check"], ["--retry-failed-tick", "check"]):
        with pytest.raises(CommandError, match=r"did you mean 'day'|give once_per as well") as caught:
            call_command("guarded", *wrong)
        assert caught.value.returncode == 2


def test_each_job_has_ticks_of_its_own(clock: Clock) -> None:
    runs: list[str] = []

    @cron_guard("job:{shop}", once_per="hour")
    def job(shop: str) -> None:
        runs.append(shop)

    for shop in ("a", "b's", "a", "b's", 'c"\\'):
        job(shop)
    assert runs == ["a", "b's", 'c"\\']

    configure(namespace="other")
    job("a")
    assert runs[3:] == ["a"]


def test_a_failed_run_is_repeated_only_on_request(clock: Clock) -> None:
    runs: list[bool] = []

    def job(*, fail: bool) -> None:
        runs.append(fail)
        if fail:
            raise ValueError("failed")

    once = cron_guard("job", once_per="hour")(job)
    again = cron_guard("job", once_per="hour", retry_failed_tick=True)(job)
    with pytest.raises(ValueError, match="failed"):
        once(fail=True)
    once(fail=False)
    assert runs == [True]
    assert last_success("job") is None

    with pytest.raises(ValueError, match="failed"):
        again(fail=True)
    again(fail=False)
    again(fail=False)
    assert runs == [True, True, False]
    assert last_success("job") == START


@pytest.mark.parametrize("is_async", [False, True])
def test_a_run_that_lost_its_lock_is_no_success(clock: Clock, store: LockStore, *, is_async: bool) -> None:
    def cut() -> None:
        store.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
        )
        held = current_lock()
        assert held is not None
        wait_for(lambda: held.is_lost)

    async def acut() -> None:
        cut()

    job: Any = cron_guard("job", once_per="hour", retry_failed_tick=True)(acut if is_async else cut)
    for _ in range(2):  # again, since it was none
        with pytest.raises(LockLost):
            asyncio.run(job()) if is_async else job()
    assert last_success("job") is None


def test_a_run_that_was_rolled_back_is_no_success(clock: Clock) -> None:
    runs: list[int] = []
    job = cron_guard("job", once_per="hour", retry_failed_tick=True)(runs.append)
    configure(dsn=None)  # the transaction holds the lock, hence the store is Django's
    with transaction.atomic():
        job(1)
        transaction.set_rollback(True)
    assert last_success("job") is None
    with transaction.atomic():
        job(2)
        assert last_success("job") is None
    assert runs == [1, 2]
    assert last_success("job") is not None


def test_a_success_counts_with_the_commit_also_of_a_manual_transaction(clock: Clock) -> None:
    """In the same moment: else the next host, which waits for the lock, would find a run that did not succeed."""
    runs: list[int] = []
    job = cron_guard("job", once_per="hour", retry_failed_tick=True)(runs.append)
    configure(dsn=None)
    transaction.set_autocommit(autocommit=False)
    try:
        job(1)
        transaction.rollback()
        job(2)
        assert last_success("job") is None
        transaction.commit()
        assert last_success("job") is not None
    finally:
        transaction.set_autocommit(autocommit=True)
    job(3)
    assert runs == [1, 2]


def test_a_success_that_a_transaction_can_not_write_leaves_it_as_it_was(
    clock: Clock, store: LockStore, caplog: pytest.LogCaptureFixture
) -> None:
    def job() -> None:
        store.connection.execute("ALTER TABLE concurrency_safe_tick RENAME succeeded TO broken")

    configure(dsn=None)
    try:
        with transaction.atomic():
            cron_guard("job", once_per="hour")(job)()
            assert connection.cursor().execute("SELECT 7") is not None  # it goes on
    finally:
        store.connection.execute("ALTER TABLE concurrency_safe_tick RENAME broken TO succeeded")
    assert "succeeded, which was not recorded" in caplog.text


def test_an_interrupt_while_a_success_is_written_leaves_the_transaction_as_it_was(
    clock: Clock, store: LockStore
) -> None:
    """The row is locked by somebody else for a while."""
    configure(dsn=None)

    def on_alarm(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, on_alarm)
    with psycopg.connect(store.dsn) as other, transaction.atomic():

        def job() -> None:
            other.execute("SELECT FROM concurrency_safe_tick FOR UPDATE")
            signal.setitimer(signal.ITIMER_REAL, 0.2)

        with pytest.raises(KeyboardInterrupt):
            cron_guard("job", once_per="hour")(job)()
    signal.signal(signal.SIGALRM, before)
    assert last_success("job") is None


def test_what_has_not_run_is_no_success(clock: Clock) -> None:
    async def job() -> None: ...

    with pytest.raises(ConfigurationError, match="returned a coroutine"):
        cron_guard("job", once_per="hour")(lambda: cast("object", job()))()
    assert last_success("job") is None


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (None, 1), (3, 2)])
def test_an_exit_with_success_is_one(clock: Clock, code: int | None, runs: int) -> None:
    seen: list[int | None] = []

    @cron_guard("job", once_per="hour", retry_failed_tick=True)
    def job() -> None:
        seen.append(code)
        sys.exit(code)

    for _ in range(2):
        with suppress(SystemExit):
            job()
    assert len(seen) == runs


def test_the_wait_for_the_lock_does_not_make_a_later_tick(clock: Clock, store: LockStore, rival: Rival) -> None:
    """Two hosts start at the same moment; the job of the first takes so long that the next minute has come."""
    runs: list[int] = []
    job = cron_guard("job", once_per="1s", timeout=None)(runs.append)
    store.connection.execute("UPDATE sim.clock SET time = to_timestamp(1000)")
    job(1)

    rival.hold("job")
    store.connection.execute(
        "CREATE OR REPLACE FUNCTION sim.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
        " AS $$SELECT to_timestamp(1000) + (pg_catalog.clock_timestamp() - time) FROM sim.clock$$;"
        "UPDATE sim.clock SET time = pg_catalog.clock_timestamp()"
    )
    thread = threading.Thread(target=lambda: rival.connection.execute("SELECT pg_sleep(0.8), pg_advisory_unlock_all()"))
    thread.start()
    job(2)
    thread.join()
    assert runs == [1]


def test_last_success_is_the_databases_time_in_utc(clock: Clock) -> None:
    job = cron_guard("job", once_per="minute")(lambda: None)
    assert last_success("job") is None
    for minutes in (0, 5):
        clock.set(START + timedelta(minutes=minutes))
        job()
    seen = last_success("job")
    assert seen == START + timedelta(minutes=5)
    assert seen.tzinfo is timezone.utc
    assert last_success(("job", "1")) is None


def ticks(store: LockStore) -> int:
    row = store.connection.execute("SELECT count(*) FROM concurrency_safe_tick").fetchone()
    assert row
    return int(row[0])


def test_old_ticks_are_forgotten_at_a_success(clock: Clock, store: LockStore) -> None:
    days: list[int] = []

    @cron_guard("job", once_per="day")
    def job(day: int) -> None:
        if day == 40:
            raise ValueError("failed")
        days.append(day)

    for day in range(40):
        clock.set(START + timedelta(days=day))
        job(day)
    assert ticks(store) == 31
    clock.set(START + timedelta(days=40))
    with pytest.raises(ValueError, match="failed"):
        job(40)
    assert ticks(store) == 32
    assert len(days) == 40


def test_no_session_is_added_for_ticks_and_none_is_left_in_a_transaction(clock: Clock, store: LockStore) -> None:
    @cron_guard("job", once_per="hour")
    def job() -> int:
        return store.sessions()

    assert job() == 1
    assert store.connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cs:%' AND state <> 'idle'"
    ).fetchone() == (0,)


def test_where_locks_are_switched_off_every_call_runs(clock: Clock, store: LockStore) -> None:
    job = cron_guard("job", once_per="hour")(lambda: 1)

    @cron_guard("job", once_per="hour")
    async def ajob() -> int:
        return 2

    configure(enabled=False)
    assert [job(), job()] == [1, 1]
    assert [asyncio.run(ajob()), asyncio.run(ajob())] == [2, 2]
    assert ticks(store) == 0


def test_a_success_that_can_not_be_written_down_is_logged(
    clock: Clock, store: LockStore, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks() -> str:
        store.connection.execute("ALTER TABLE concurrency_safe_tick RENAME succeeded TO broken")
        return "ran"

    @cron_guard("ajob", once_per="hour")
    async def abreaks() -> str:
        return breaks()

    def repair() -> None:
        store.connection.execute("ALTER TABLE concurrency_safe_tick RENAME broken TO succeeded")

    job = cron_guard("job", once_per="hour")(breaks)
    try:
        assert job() == "ran"
        repair()
        assert asyncio.run(abreaks()) == "ran"
    finally:
        repair()
    assert [record.getMessage()[:38] for record in caplog.records] == [
        "a tick of 'job' succeeded, which was n",
        "a tick of 'ajob' succeeded, which was ",
    ]
    assert job() is None


def test_without_the_table_nothing_runs_and_the_remedy_is_named(clock: Clock, store: LockStore) -> None:
    runs: list[int] = []
    job = cron_guard("job", once_per="hour")(lambda: runs.append(1))

    @cron_guard("job", once_per="hour")
    async def ajob() -> None:
        runs.append(2)

    store.connection.execute("DROP TABLE concurrency_safe_tick")
    try:
        with pytest.raises(ConfigurationError, match=r"migrate concurrency_safe.*concurrency-safe init"):
            job()
        with pytest.raises(ConfigurationError, match="concurrency-safe init"):
            asyncio.run(ajob())
        assert store.rows() == 0
        create_tables()
        create_tables()
        job()
        assert runs == [1]
    finally:
        store.connection.execute(CREATE_TICK)


def test_the_migration_makes_the_table_and_takes_it_away(clock: Clock) -> None:
    from django.core.management import call_command

    def tables() -> list[str]:
        return [name for name in connection.introspection.table_names() if name == "concurrency_safe_tick"]

    assert tables() == ["concurrency_safe_tick"]
    call_command("migrate", "concurrency_safe", "0001", verbosity=0)
    try:
        assert tables() == []
    finally:
        call_command("migrate", "concurrency_safe", verbosity=0)
    assert tables() == ["concurrency_safe_tick"]


def test_without_the_right_to_write_nothing_runs(clock: Clock, store: LockStore) -> None:
    configure(dsn=make_conninfo(clock.dsn, options="-c default_transaction_read_only=on"))
    with pytest.raises(LockUnavailable, match="the ticks of 'job' can't be read or written: cannot execute"):
        cron_guard("job", once_per="hour")(lambda: None)()
    with pytest.raises(LockUnavailable, match="what the library keeps can't be read or written: cannot execute"):
        create_tables()
    assert store.rows() == 0
