"""`concurrency-safe run` in processes of its own: exit statuses, signals, and deaths."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from tests.integration.conftest import LockStore, Rival, bare_environment, wait_for
from tests.settings import NO_SERVER

SHELL = ["/bin/sh", "-c"]
PROGRAM = [sys.executable, "-m", "concurrency_safe.cli", "run"]

#: Says its pid and "ready"; then each signal's number as it comes. The end of its input ends it, with status 7.
LISTENER = [
    sys.executable,
    "-ISc",
    """
import os, signal, sys
def hear(number, frame):
    os.write(1, b"%d\\n" % number)
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), hear)
os.write(1, b"%d\\n" % os.getpid())
while os.read(0, 1): pass
sys.exit(7)
""",
]

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(dsn: str) -> Iterator[Run]:
    """Start `concurrency-safe run` with these arguments."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes the pipes: a LISTENER ends with its input
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Let it come to its end; give its exit status and what was said."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def said(process: subprocess.Popen[str]) -> str:
    """Give the next line of the command."""
    assert process.stdout
    line = process.stdout.readline().strip()
    assert line, end(process)
    return line


def is_alive(pid: int) -> bool:
    """Say whether a process runs; a zombie that nobody has buried yet doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between opening and reading
        return False


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 42"], 42, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
        (["no-such-command"], 127, "concurrency-safe: no-such-command: No such file or directory\n"),
        (["/"], 126, "concurrency-safe: /: Permission denied\n"),
        ([__file__], 126, f"concurrency-safe: {__file__}: Permission denied\n"),
        ([""], 127, "concurrency-safe: : No such file or directory\n"),
    ],
)
def test_the_exit_status_is_the_commands_own(
    run: Run, rival: Rival, command: list[str], status: int, message: str
) -> None:
    assert end(run("job", "--", *command)) == (status, "", message)
    assert rival.is_free("job")


def test_input_output_and_arguments_are_the_commands_own(run: Run) -> None:
    process = run("job", "--quiet", "--", "sh", "-c", 'cat; echo "$@" >&2', "-", "--wait", "--", "a b")
    out, err = process.communicate("text", timeout=30)
    assert (process.returncode, out, err) == (0, "text", "--wait -- a b\n")


def test_a_lock_that_is_taken_ends_it_with_75_or_what_one_says(run: Run, rival: Rival) -> None:
    rival.hold("job")
    status, out, err = end(run("job", "--", "echo", "ran"))
    assert (status, out) == (75, "")
    assert err.startswith("concurrency-safe: not run: lock 'job' is held by")
    assert end(run("-E", "3", "--quiet", "job", "--", "echo", "ran")) == (3, "", "")
    status, out, err = end(run("job", "--wait=0.05", "--", "echo", "ran"))
    assert (status, out) == (75, "")
    assert "gave up after" in err


def who(key: str, dsn: str) -> tuple[int, list[str]]:
    command = [*PROGRAM[:-1], "who", key]
    environment = {**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    return answer.returncode, answer.stdout.splitlines() or [answer.stderr]


def test_who_holds_and_who_waits(run: Run, store: LockStore, dsn: str) -> None:
    holder = run("{job}", "--", *LISTENER)
    said(holder)
    waiter = run("--wait", "{job}", "--", "true")
    wait_for(store.waiting)
    status, (held, awaited) = who("{job}", dsn)
    assert status == 0
    assert re.fullmatch(rf"held by \S+ pid {holder.pid} \(server process \d+\)", held)
    assert re.fullmatch(rf"awaited by \S+ pid {waiter.pid} \(server process \d+\)", awaited)
    assert end(holder)[0] == 7
    assert end(waiter)[0] == 0
    assert who("{job}", dsn) == (0, ["free"])


def test_who_holds_a_slot_and_who_waits_for_one(run: Run, store: LockStore, dsn: str) -> None:
    holders = [run("--slots=2", "job", "--", *LISTENER) for _ in range(2)]
    for holder in holders:
        said(holder)
    waiters = [run("--slots=2", "--wait", "job", "--", "true") for _ in range(2)]
    wait_for(store.waiting)
    _, lines = who("job", dsn)
    assert sorted(line.split(" pid ")[0].split()[0] for line in lines) == ["awaited", "awaited", "held", "held"]
    for process in (*holders, *waiters):
        assert f" pid {process.pid} " in " ".join(lines)


def test_who_can_not_tell_without_a_store() -> None:
    status, (message,) = who("job", NO_SERVER)
    assert status == 69
    assert message.startswith("concurrency-safe: can't tell: the lock store can't be reached")


def test_who_can_not_tell_without_the_right_to_read_locks(store: LockStore) -> None:
    role = f"blind_{uuid.uuid4().hex[:8]}"
    store.connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'dark'; REVOKE SELECT ON pg_locks FROM PUBLIC")
    try:
        status, (message,) = who("job", make_conninfo(store.dsn, user=role, password="dark"))
        assert status == 69
        assert "who holds lock 'job' can't be read: " in message
        assert "permission denied for view pg_locks" in message
    finally:
        store.connection.execute(f"GRANT SELECT ON pg_locks TO PUBLIC; DROP ROLE {role}")


def test_it_waits(run: Run, rival: Rival, store: LockStore) -> None:
    rival.hold("job")
    process = run("--wait", "job", "--", "echo", "ran")
    wait_for(store.waiting)
    rival.let_go()
    assert end(process) == (0, "ran\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait(run: Run, rival: Rival, store: LockStore, number: signal.Signals) -> None:
    rival.hold("job")
    process = run("--wait", "job", "--", "echo", "ran")
    wait_for(store.waiting)
    process.send_signal(number)
    assert end(process) == (128 + number, "", "")
    assert not store.waiting()


def test_readers_and_slots(run: Run) -> None:
    reader = run("--shared", "readers", "--", *LISTENER)
    slot = run("--slots=2", "slots", "--", *LISTENER)
    said(reader)
    said(slot)
    assert end(run("--shared", "readers", "--", "true"))[0] == 0
    assert end(run("readers", "--", "true"))[0] == 75
    second = run("--slots=2", "slots", "--", *LISTENER)
    said(second)
    assert end(run("--slots=2", "slots", "--", "true"))[0] == 75
    assert [end(each)[0] for each in (reader, slot, second)] == [7, 7, 7]


def test_without_a_lock_store_nothing_runs(run: Run) -> None:
    cases = [
        (run("job", "--", "echo", "ran", CONCURRENCY_SAFE_DSN=NO_SERVER), "can't be reached"),
        (run("job", "--", "echo", "ran", CONCURRENCY_SAFE_DSN=""), "CONCURRENCY_SAFE_DSN or DATABASE_URL"),
        (run("job", "--", "echo", "ran", DJANGO_SETTINGS_MODULE="no_such_settings"), "no_such_settings"),
    ]
    for process, message in cases:
        status, out, err = end(process)
        assert (status, out) == (69, "")
        assert message in err
        assert err.startswith("concurrency-safe: not run: ")
        assert "Traceback" not in err


def test_django_settings_name_the_store_too(run: Run, store: LockStore, rival: Rival) -> None:
    rival.hold("job")
    django = {"CONCURRENCY_SAFE_DSN": "", "DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": store.url}
    assert end(run("job", "--", "true", **django))[0] == 75
    rival.let_go()
    assert end(run("job", "--", "true", **django)) == (0, "", "")


def test_a_service_file_names_the_store_and_its_password(
    run: Run, store: LockStore, rival: Rival, tmp_path: Path
) -> None:
    info = store.connection.info
    service = tmp_path / "services"
    service.write_text(
        f"[locks]\nhost={info.host}\nport={info.port}\ndbname={info.dbname}\nuser={info.user}\npassword={info.password}\n"
    )
    rival.hold("job")
    environment = {"CONCURRENCY_SAFE_DSN": "service=locks", "PGSERVICEFILE": str(service)}
    assert end(run("job", "--", "true", **environment))[0] == 75
    rival.let_go()
    assert end(run("job", "--", "true", **environment)) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["job"], "give the command behind --"),
        (["job", "true"], "unexpected extra argument"),
        (["job", "--wait=soon", "--", "true"], "'soon' is not a valid float"),
        (["", "--", "true"], "a key must not be empty"),
        (["job", "--shared", "--slots=2", "--", "true"], "exclude each other"),
        (["job", "--slots=9999", "--", "true"], "1<=x<=1000"),
        (["job", "--wait=nan", "--", "true"], "--wait=nan is no number of seconds"),
        (["job", "--grace=nan", "--", "true"], "--grace=nan is no number of seconds"),
        (["job", "--tick=0001-01-01T00:00:00+14:00", "--", "true"], "is no point in time"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_usage(run: Run, arguments: list[str], message: str) -> None:
    status, _, err = end(run(*arguments))
    assert status == 2
    assert message in err


def test_signals_reach_the_command_once_each_and_in_order(run: Run) -> None:
    names = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGWINCH"]
    process = run("job", "--", *LISTENER, *names)
    said(process)
    for name in names:
        number = getattr(signal, name)
        process.send_signal(number)
        assert said(process) == str(int(number))
    assert end(process) == (7, "", "")


def test_min_hold_keeps_the_lock_until_a_signal_ends_it(run: Run, rival: Rival) -> None:
    process = run("--min-hold=60", "job", "--", "sh", "-c", "echo $$; exit 3")
    pid = int(said(process))
    wait_for(lambda: not is_alive(pid))
    assert end(run("job", "--", "true"))[0] == 75
    process.send_signal(signal.SIGWINCH)
    process.terminate()
    assert end(process)[0] == 3
    assert rival.is_free("job")
    assert end(run("--min-hold=0.05", "job", "--", "true"))[0] == 0


def test_a_command_that_a_passed_signal_ends(run: Run, rival: Rival) -> None:
    process = run("job", "--", *LISTENER)
    said(process)
    process.terminate()
    assert process.wait(30) == 143  # not `end`: its end of input would end the command, too
    assert rival.is_free("job")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_that_a_signal_ends_leaves_nothing_at_work(run: Run, rival: Rival, number: signal.Signals) -> None:
    """Its children are stopped before the lock is released; a daemon has cut itself off, and goes on."""
    script = "sleep 60 & echo $!; timeout 60 sleep 60 & echo $!; setsid sleep 60 & echo $!; echo; wait"
    process = run("--grace=5", "--min-hold=60", "job", "--", *SHELL, script)
    *pids, daemon = (int(said(process)) for _ in range(3))
    assert process.stdout
    assert process.stdout.readline() == "\n"
    wait_for(lambda: os.getsid(daemon) == daemon)
    try:
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert not any(map(is_alive, pids))
        assert rival.is_free("job")
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_a_script_that_names_no_interpreter_is_the_shells(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "job"
    script.write_text('echo "$1"\n')
    script.chmod(0o755)
    assert end(run("job", "--", str(script), "ran")) == (0, "ran\n", "")
    assert end(run("job", "--", "job", "found", PATH=f"{tmp_path}:{os.environ['PATH']}")) == (0, "found\n", "")


@pytest.mark.parametrize("stream", ["a closed pipe", "a full disk"])
def test_the_exit_status_stays_when_nobody_reads_the_message(dsn: str, rival: Rival, stream: str) -> None:
    rival.hold("job")
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "job", "--", "true"],
            stderr=full if stream == "a full disk" else writer,
            env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
            check=False,
        )
    os.close(writer)
    assert done.returncode == 75


def test_it_works_with_few_files_and_with_many(dsn: str) -> None:
    many = 'for n in $(seq 10 1100); do eval "exec $n</dev/null"; done; exec "$@"'
    for limit, script in (("64", 'exec "$@"'), ("3000", many)):
        done = subprocess.run(
            ["/bin/bash", "-c", f"ulimit -n {limit}; {script}", "-", *PROGRAM, "job", "--", "echo", "ran"],
            capture_output=True,
            text=True,
            env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_settings_that_can_not_be_read_are_no_lock_store(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken_settings.py").write_text("{}['SECRET']")
    process = run("job", "--", "true", DJANGO_SETTINGS_MODULE="broken_settings", PYTHONPATH=str(tmp_path))
    assert end(process) == (69, "", "concurrency-safe: not run: Django's settings can't be read: KeyError: 'SECRET'\n")


def test_what_it_was_started_to_ignore_the_command_ignores_too(dsn: str) -> None:
    with subprocess.Popen(
        [*SHELL, 'trap "" HUP; exec "$@"', "-", *PROGRAM, "job", "--", *LISTENER, "SIGUSR1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
    ) as process:
        pid = int(said(process))
        process.send_signal(signal.SIGHUP)
        os.kill(pid, signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert said(process) == str(int(signal.SIGUSR1))
    assert process.returncode == 7


class Terminal:
    """`concurrency-safe run job -- LISTENER`, as somebody starts it at a terminal."""

    def __init__(self, dsn: str, *signals: str) -> None:
        self._ours, self._theirs = pty.openpty()
        # The leader of a new session makes the terminal that it opens first its own.
        script = 'exec "$@" <"$0" >"$0"'
        self.process = subprocess.Popen(
            [*SHELL, script, os.ttyname(self._theirs), *PROGRAM, "--grace=0.3", "job", "--", *LISTENER, *signals],
            env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
            start_new_session=True,
        )

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def line(self) -> str:
        """Give the next line of the screen, less the echo of Ctrl-C."""
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._ours, 1)
        return line.decode().strip().removeprefix("^C")

    def close(self) -> None:
        os.close(self._theirs)
        os.close(self._ours)  # hangs up
        self.process.kill()
        self.process.wait()


@pytest.fixture
def at_terminal(dsn: str) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*signals: str) -> Terminal:
        opened.append(Terminal(dsn, *signals))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_on_a_terminal_the_command_gets_one_interrupt(at_terminal: Callable[..., Terminal]) -> None:
    terminal = at_terminal("SIGINT", "SIGUSR1")
    terminal.line()
    terminal.type(b"\x03")
    assert terminal.line() == "2"
    terminal.process.send_signal(signal.SIGUSR1)  # passed on behind whatever the interrupt has left
    assert terminal.line() == "10"
    terminal.type(b"\x04")
    assert terminal.process.wait(30) == 7


def test_a_command_behind_a_pipe_may_read_from_the_terminal(dsn: str) -> None:
    """As those do that ask for a password."""
    ours, theirs = pty.openpty()
    command = [*PROGRAM, "job", "--", "sh", "-c", "echo ready; read line </dev/tty; echo got $line"]
    process = subprocess.Popen(
        [*SHELL, 'name="$0"; exec <"$name" >"$name"; true | "$@"', os.ttyname(theirs), *command],
        env={**bare_environment(), "CONCURRENCY_SAFE_DSN": dsn},
        start_new_session=True,
    )
    try:
        screen = b""
        while b"ready" not in screen:
            screen += os.read(ours, 1)
        os.write(ours, b"hello\n")
        while b"got hello" not in screen:
            screen += os.read(ours, 1)
        assert process.wait(30) == 0
    finally:
        os.close(theirs)
        os.close(ours)
        process.kill()
        process.wait()


@pytest.mark.parametrize("heard", [[], ["SIGTERM"]], ids=["it listens", "it is deaf"])
def test_on_a_terminal_a_lost_lock_ends_the_command_alone(
    at_terminal: Callable[..., Terminal], store: LockStore, heard: list[str]
) -> None:
    terminal = at_terminal(*heard)
    pid = int(terminal.line())
    cut_sessions(store)
    assert terminal.process.wait(30) == 76
    assert not is_alive(pid)


def cut_sessions(store: LockStore) -> None:
    """Let the server end every lock session of this database, and wait until it has."""
    store.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'cs:%'"
    )
    wait_for(lambda: store.rows() == 0)  # they have heard it


def test_a_lost_lock_ends_the_command(run: Run, store: LockStore) -> None:
    process = run("job", "--", *LISTENER)
    pid = int(said(process))
    cut_sessions(store)
    process.wait(30)
    assert not is_alive(pid)
    status, _, err = end(process)
    assert status == 76
    assert "lock 'job' was lost while it was held" in err


@pytest.mark.parametrize(
    "script",
    [
        'trap "" TERM; sleep 60 & echo $!; echo $$; wait',
        '(trap "" TERM; exec sleep 60) & echo $!; echo $$; wait',
        'timeout 60 sh -c "trap : TERM; echo \\$\\$; sleep 60; sleep 60" & echo $$; wait',
    ],
    ids=["both deaf", "the child deaf", "a group of its own"],
)
def test_a_lost_lock_ends_what_the_command_has_started(run: Run, store: LockStore, script: str) -> None:
    process = run("--grace=0.3", "job", "--", *SHELL, script)
    pids = [int(said(process)), int(said(process))]
    cut_sessions(store)
    process.wait(30)
    wait_for(lambda: not any(map(is_alive, pids)))
    assert end(process)[0] == 76


def test_killed_it_leaves_the_lock_to_the_command(run: Run, rival: Rival, store: LockStore) -> None:
    process = run("job", "--", *LISTENER)
    pid = int(said(process))
    process.kill()
    process.wait()

    assert end(run("job", "--", "true"))[0] == 75
    assert is_alive(pid)
    assert store.rows() == 1
    assert process.stdin
    process.stdin.close()
    wait_for(lambda: rival.is_free("job"))
    assert end(run("job", "--", "true"))[0] == 0


def test_of_several_daemons_one_runs_whatever_ends_it(run: Run, store: LockStore) -> None:
    """Leaders end in four ways, and each time exactly one of those who wait takes over."""
    waiting = [run("--wait", "beat", "--", *LISTENER) for _ in range(5)]
    leaders: list[int] = []
    for way in ("term", "kill", "command killed", "cut"):
        wait_for(lambda: store.count("l.granted") == 1 and store.waiting() == len(waiting) - 1)
        leader = _leader(waiting)
        waiting.remove(leader)
        pid = int(said(leader))
        assert not any(map(is_alive, leaders))
        leaders.append(pid)
        if way == "term":
            leader.terminate()
        elif way == "kill":
            leader.kill()
            leader.wait()
            assert store.waiting() == len(waiting)
            os.kill(pid, signal.SIGKILL)
        elif way == "command killed":
            os.kill(pid, signal.SIGKILL)
        else:
            store.connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
    (last,) = waiting
    said(last)
    wait_for(lambda: not any(map(is_alive, leaders)))  # a server that cuts a session doesn't wait for its client
    assert end(last)[0] == 7


def _leader(processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Give the one whose command has said something."""
    outputs = {process.stdout.fileno(): process for process in processes if process.stdout}
    (ready,) = select.select(list(outputs), [], [], 15)[0]
    return outputs[ready]


def test_a_daemon_that_the_command_leaves_behind_pins_nothing(run: Run, rival: Rival, store: LockStore) -> None:
    process = run("job", "--", "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!")
    daemon = int(said(process))
    try:
        assert end(process) == (0, "", "")
        assert rival.is_free("job")
        wait_for(lambda: store.sessions() == 0)
        assert is_alive(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)
