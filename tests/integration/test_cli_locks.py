"""`concurrency-safe locks` and `manage.py locks`: every holder and every waiter, with the texts of their keys."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from io import StringIO
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from psycopg.conninfo import make_conninfo

from concurrency_safe import LockUnavailable, configure, lock
from concurrency_safe.core.keys import lock_key
from concurrency_safe.core.steps import READ
from concurrency_safe.locks import current_work
from concurrency_safe.postgres import sql
from concurrency_safe.postgres import watch as watchers
from concurrency_safe.postgres.waiting import wait_socket
from concurrency_safe.tables import census, duration
from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for
from tests.integration.test_cli_run import LISTENER, PROGRAM, Run, run, said
from tests.integration.test_shared_sessions import session_of
from tests.settings import NO_SERVER

__all__ = ["run"]  # a fixture

#: Holds a few locks, several on one session, until its input ends.
HOLDER = [
    sys.executable,
    "-c",
    """
import sys
from concurrency_safe import lock
from concurrency_safe.locks import current_work
held = [lock("a").acquire(), lock(("stock", "x"), shared=True).acquire(), lock("gpu", slots=2).acquire()]
current_work.set("task-7")
held.append(lock("of a task").acquire())
print("held", flush=True)
sys.stdin.read()
""",
]


@pytest.fixture
def holder(dsn: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        HOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def locks(dsn: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    command = [*PROGRAM[:-1], "locks", *arguments]
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn, **environment}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    return answer.returncode, answer.stdout, answer.stderr


def seen(dsn: str, *arguments: str) -> list[dict[str, Any]]:
    status, out, err = locks(dsn, "--json", *arguments)
    assert (status, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def test_json_lists_every_holder_and_every_waiter_in_order(
    run: Run, store: LockStore, dsn: str, holder: subprocess.Popen[str]
) -> None:
    waiters = []
    for number in range(3):
        waiters.append(run("--wait", "a", "--", "true"))
        wait_for(lambda: store.waiting() == number + 1)  # noqa: B023 - looked at at once

    rows = seen(dsn)
    assert {(row["key"], row["state"], row["mode"], row["work"]) for row in rows} == {
        ("a", "held", "exclusive", None),
        ("(stock/x)", "held", "shared", None),
        ("gpu", "held", "exclusive", None),
        ("of a task", "held", "exclusive", "task-7"),
        ("a", "waiting", "exclusive", None),
    }
    assert [row["pid"] for row in rows if row["state"] == "waiting"] == [waiter.pid for waiter in waiters]
    held = [row for row in rows if row["state"] == "held"]
    assert {row["pid"] for row in held} == {holder.pid}
    assert len({row["backend_pid"] for row in held}) == 2  # three of them share a session
    for row in rows:
        assert row["application"].startswith(f"cs:{row['host']}:{row['pid']}")
        since = datetime.fromisoformat(row["since"])
        assert timedelta(0) <= datetime.now(timezone.utc) - since < timedelta(minutes=1)


def test_who_waits_for_a_slot_is_known_by_its_key(run: Run, store: LockStore, dsn: str) -> None:
    holders = [run("--slots=1", "one", "--", *LISTENER), run("--slots=2", "two", "--", *LISTENER)]
    holders.append(run("--slots=2", "two", "--", *LISTENER))
    for one in holders:
        said(one)
    waiter = run("--slots=2", "--wait", "two", "--", "true")
    wait_for(lambda: store.rows() == 4)  # three holders, and the gate
    rows = seen(dsn)
    assert {(row["key"], row["pid"]) for row in rows if row["state"] == "held"} == {
        ("one", holders[0].pid),
        ("two", holders[1].pid),
        ("two", holders[2].pid),
    }
    assert [(row["key"], row["pid"]) for row in rows if row["state"] == "waiting"] == [("two", waiter.pid)]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(
    run: Run, store: LockStore, dsn: str, holder: subprocess.Popen[str], width: int
) -> None:
    waiter = run("--wait", "a", "--", "true")
    wait_for(store.waiting)
    status, out, err = locks(dsn, COLUMNS=str(width))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["key", "state", "for", "host", "pid", "server", "pid", "task"]
    (waiting,) = [number for number, line in enumerate(lines) if f" {waiter.pid} " in line]
    assert re.match(r"a +held ", lines[waiting - 1])
    assert re.match(r" +waiting +\d", lines[waiting])
    assert re.search(r"^of a task +held .* task-7 *$", out, re.MULTILINE)
    assert re.search(r"^\(stock/x\) +held, shared ", out, re.MULTILINE)
    assert re.search(r"4 held, 1 waiting; the server's lock table holds \d+ of about \d+ \(\d+ %\)", out)


def test_a_process_that_can_not_answer_shows_its_number(dsn: str, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    _, out, _ = locks(dsn, "a", "gpu")
    assert len(re.findall(rf"^(?:a|gpu) +held .* {holder.pid} ", out, re.MULTILINE)) == 2
    assert len(re.findall(rf"^#-?\d+ +held.* {holder.pid} ", out, re.MULTILINE)) == 2


@pytest.mark.parametrize("when", ["before its release", "after"])
def test_who_asks_about_a_lock_that_is_over_soon_hears_its_text(dsn: str, store: LockStore, when: str) -> None:
    """The watcher answers up to a second later; who releases answers at once, since its process may end then."""
    configure(dsn=dsn)
    channel = f"concurrency_safe_{0:016x}"
    question = f"LISTEN {channel}; SELECT pg_notify('{sql.QUESTION}', '{channel}')"
    with lock("over soon") as held:
        watcher, session = watchers._watcher, session_of(held)
        assert watcher is not None
        if when == "before its release":
            del watcher.sessions[session.pgconn.socket]  # it does not answer
            store.connection.execute(question)
            wait_for(lambda: wait_socket(session.pgconn.socket, READ, 0))
    if when == "after":
        store.connection.execute(question)
    number = lock_key("over soon").number
    told = [json.loads(notify.payload) for notify in store.connection.notifies(timeout=10, stop_after=2)]
    store.connection.execute(f"UNLISTEN {channel}")
    assert told == [[[number, number, "over soon", None]], []]


def test_a_lock_of_somebody_else_is_shown_only_when_it_is_named(rival: Rival, dsn: str) -> None:
    configure(dsn=dsn)
    rival.hold("job")
    assert census([]).locks == ()
    (row,) = census(["job", "other"]).locks
    assert (row.key, row.pid, row.backend_pid, row.application) == ("job", None, rival.pid, "")


def test_what_the_asker_itself_holds_is_listed(dsn: str) -> None:
    configure(dsn=dsn)
    token = current_work.set("its task")
    try:
        with lock("other session"):
            current_work.reset(token)
            with lock("own session"):
                keys = {row.key: row.work for row in census([]).locks}
    finally:
        current_work.set(None)
    assert keys == {"other session": "its task", "own session": ""}


def test_many_keys_are_told_in_several_pieces(dsn: str) -> None:
    configure(dsn=dsn)
    keys = {f"{number}:{'long key ' * 20}" for number in range(200)}
    current_work.set("many")
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(lock(key))
        current_work.set(None)
        assert {row.key for row in census([]).locks} == keys


def test_a_key_that_is_long_or_strange_is_told_and_shown(dsn: str) -> None:
    configure(dsn=dsn)
    with lock("\U0001f512" * 700), lock("x" * 3000), lock("e\x1b[31mred\n"):
        keys = sorted(row.key or "?" for row in census([]).locks)
        _, out, _ = locks(dsn)
    assert keys[0] == "e\x1b[31mred\n"
    assert keys[1] == "x" * 1000 + "…"
    assert keys[2].startswith("\U0001f512" * 100)
    assert keys[2].endswith("\U0001f512…")
    assert "\x1b" not in out
    assert "e\\x1b[31mred\\n" in out


def test_questions_that_are_none_cost_nobody_a_lock(dsn: str, store: LockStore) -> None:
    configure(dsn=dsn)
    with lock("job") as held:
        for payload in ("", "x" * 7000, "x', ''); SELECT pg_advisory_unlock_all(); --", "concurrency_safe_x"):
            store.connection.execute("SELECT pg_notify(%s, %s)", [sql.QUESTION, payload])
        assert seen(dsn)[0]["key"] == "job"
        held.check()


def test_a_lock_behind_a_pooler_shows_its_number(dsn: str) -> None:
    configure(dsn=dsn, pooler="transaction")
    with lock("job"):
        (row,) = census([]).locks
        assert (row.key, row.pid) == (None, os.getpid())
        (row,) = census(["job"]).locks
        assert row.key == "job"


def test_without_a_store_and_without_the_right_there_is_an_error(dsn: str, store: LockStore) -> None:
    status, out, err = locks(NO_SERVER)
    assert (status, out) == (69, "")
    assert err.startswith("concurrency-safe: can't tell: the lock store can't be reached")

    store.connection.execute("CREATE ROLE blind LOGIN PASSWORD 'dark'; REVOKE SELECT ON pg_locks FROM PUBLIC")
    try:
        configure(dsn=make_conninfo(dsn, user="blind", password="dark"))
        with pytest.raises(LockUnavailable, match="the locks can't be read: permission denied"):
            census([])
    finally:
        store.connection.execute("GRANT SELECT ON pg_locks TO PUBLIC; DROP ROLE blind")


def test_watch_shows_them_again_until_it_is_interrupted(run: Run, rival: Rival, dsn: str) -> None:
    ours, theirs = pty.openpty()
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen([*PROGRAM[:-1], "locks", "--watch", "job"], stdout=theirs, env=environment)
    screen = b""

    def shows(text: bytes) -> bool:
        nonlocal screen
        screen += os.read(ours, 4096)
        return text in screen

    wait_for(lambda: shows(b"0 held"))
    rival.hold("job")
    wait_for(lambda: shows(b"1 held"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    os.close(theirs)
    os.close(ours)


def test_watch_as_json_is_a_list_a_line(rival: Rival, dsn: str) -> None:
    rival.hold("job")
    process = subprocess.Popen(
        [*PROGRAM[:-1], "locks", "--watch", "--json", "job"],
        stdout=subprocess.PIPE,
        env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn, "PYTHONUNBUFFERED": "1"},
    )
    with process:
        assert process.stdout
        assert json.loads(process.stdout.readline())[0]["backend_pid"] == rival.pid
        rival.let_go()
        assert json.loads(process.stdout.readline()) == []
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def test_the_management_command_shows_the_same(rival: Rival) -> None:
    rival.hold("job")
    out = StringIO()
    call_command("locks", "job", "--json", stdout=out)
    assert json.loads(out.getvalue())[0]["backend_pid"] == rival.pid
    out = StringIO()
    call_command("locks", "job", stdout=out)
    assert re.search(rf"^job +held .* {rival.pid} *$", out.getvalue(), re.MULTILINE)
    configure(dsn=NO_SERVER)
    with pytest.raises(CommandError, match="can't tell: ") as caught:
        call_command("locks")
    assert caught.value.returncode == 69


def test_an_older_server_has_no_time_of_waiting(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        for version in (130000, 180000):
            assert connection.execute(sql.census(version)).fetchall() == []
    assert b"waitstart" not in sql.census(130000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1.0, "0.0s"), (1.26, "1.3s"), (75.0, "1m15s"), (3 * 3600 + 240, "3h04m"), (2 * 86400 + 3600, "2d01h")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
