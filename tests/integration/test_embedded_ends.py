"""No server outlives the process that started it, however that process ends, and nothing of it stays on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from concurrency_safe.testing import PostgresServer, ServerError, ValkeyServer
from tests.integration.conftest import wait_for

ROOT = Path(__file__).parents[2]
#: Seconds after which a server has to be gone. It takes 0.1 s.
END_LIMIT = 10.0

#: Says its servers' pids, and waits for the end of its input.
OWNER = """
import json, sys
from concurrency_safe.testing import PostgresServer, ValkeyServer
servers = [PostgresServer().start(), ValkeyServer().start()]
print(json.dumps([server.pid for server in servers]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a directory for all temporary files of a process; short, for unix sockets."""
    made = Path(tempfile.mkdtemp())
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def running(*command: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command, and end it with the block."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), **variables}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
    ) as process:
        yield process
        process.kill()


def says(process: subprocess.Popen[str]) -> Any:  # noqa: ANN401 - JSON
    """Read the next line that a process prints."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, f"it ended: {process.wait()}"
    return json.loads(line)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def left(folder: Path, *pids: int) -> list[object]:
    """Return what is left: processes of `pids`, or with the folder in their command line, and files."""
    processes: list[object] = [pid for pid in pids if is_there(pid)]
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = command_line.read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if f"{folder}/" in command:
            processes.append(command)
    return [*processes, *folder.glob("concurrency_safe-*")]


def test_no_server_outlives_its_killed_owner(folder: Path) -> None:
    with running(sys.executable, "-c", OWNER, folder=folder) as owner:
        pids = says(owner)
        assert len(left(folder, *pids)) > len(pids)

        owner.kill()

        wait_for(lambda: not left(folder, *pids), END_LIMIT)


def test_no_server_outlives_an_owner_that_ends_without_stop(folder: Path) -> None:
    with running(sys.executable, "-c", OWNER, folder=folder) as owner:
        pids = says(owner)

        owner.communicate()

        assert owner.returncode == 0
        wait_for(lambda: not left(folder, *pids), END_LIMIT)


def test_the_shared_servers_are_gone_before_their_process(folder: Path) -> None:
    script = """
import atexit, json, os
from pathlib import Path
from concurrency_safe.testing import embedded_postgres, embedded_valkey
# What is registered first is called last.
atexit.register(lambda: print(json.dumps([str(scratch) for scratch in scratches if scratch.exists()])))
scratches = [embedded_postgres().log.parent, embedded_valkey().log.parent]
assert all(scratch.exists() for scratch in scratches)
"""
    with running(sys.executable, "-c", script, folder=folder) as owner:
        assert says(owner) == []
        assert left(folder) == []


def test_an_owner_killed_during_initdb_leaves_nothing(folder: Path) -> None:
    with running(sys.executable, "-c", OWNER, folder=folder) as owner:
        wait_for(lambda: list(folder.glob("concurrency_safe-postgres-*/data/base")))

        owner.kill()

        wait_for(lambda: not left(folder), END_LIMIT)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="the Makefile ties nothing to make without setpriv")
def test_no_server_outlives_a_killed_make(folder: Path) -> None:
    (folder / "owner.py").write_text(OWNER)
    (folder / "Makefile").write_text(f"include {ROOT}/Makefile\nprobe:\n\t$(TETHER) $(PY) {folder}/owner.py\n")
    command = ("make", "--silent", "-C", str(ROOT), "-f", str(folder / "Makefile"), f"PY={sys.executable}", "probe")
    with running(*command, folder=folder) as make:
        pids = says(make)

        make.kill()

        wait_for(lambda: not left(folder, *pids), END_LIMIT)


def test_ctrl_c_leaves_the_server_to_its_owner(folder: Path) -> None:
    script = """
import json, signal
from concurrency_safe.testing import PostgresServer
with PostgresServer() as server:
    try:
        print(json.dumps(server.pid), flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print(json.dumps(server.running), flush=True)
"""
    with running(sys.executable, "-c", script, folder=folder) as owner:
        pid = says(owner)

        os.killpg(owner.pid, signal.SIGINT)  # what a terminal does

        assert says(owner) is True
        assert owner.wait(END_LIMIT) == 0
        assert left(folder, pid) == []


def test_a_forked_child_neither_controls_nor_keeps_the_server(folder: Path) -> None:
    script = """
import json, os, sys
from concurrency_safe.testing import PostgresServer, ServerError
server = PostgresServer().start()
reading, writing = os.pipe()
child = os.fork()
if not child:
    try:
        server.kill()
    except ServerError as error:
        os.write(writing, str(error).encode())
    sys.stdin.read()
    os._exit(0)
print(json.dumps([server.pid, child, os.read(reading, 1000).decode()]), flush=True)
os.waitpid(child, 0)
"""
    with running(sys.executable, "-c", script, folder=folder) as owner:
        pid, child, refusal = says(owner)
        assert refusal.startswith(f"the server belongs to process {owner.pid}, which started it")
        assert is_there(pid)

        owner.kill()
        owner.wait()

        wait_for(lambda: not left(folder, pid), END_LIMIT)
        assert is_there(child)
        os.kill(child, signal.SIGKILL)


def test_stop_in_a_forked_child_stops_nothing(folder: Path) -> None:
    script = """
import json, os
from concurrency_safe.testing import PostgresServer
with PostgresServer() as server:
    child = os.fork()
    if not child:
        server.stop()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([server.running, status]), flush=True)
"""
    with running(sys.executable, "-c", script, folder=folder) as owner:
        assert says(owner) == [True, 0]
        assert owner.wait(END_LIMIT) == 0


def test_a_server_outlives_the_thread_that_started_it() -> None:
    server = PostgresServer()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()

    with psycopg.connect(server.dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_no_server_outlives_its_killed_supervisor(kind: type[PostgresServer | ValkeyServer]) -> None:
    server = kind().start()
    scratch = server.log.parent
    supervisor = server._supervised._process

    supervisor.kill()

    wait_for(lambda: not is_there(server.pid), END_LIMIT)
    with pytest.raises(ServerError, match="the server's supervisor has ended"):
        server.kill()
    server.stop()
    shutil.rmtree(scratch)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_supervisor_that_is_told_to_end_clears_up_first(signum: int) -> None:
    server = PostgresServer().start()
    scratch = server.log.parent

    server._supervised._process.send_signal(signum)

    wait_for(lambda: not is_there(server.pid) and not scratch.exists(), END_LIMIT)
    server.stop()


@pytest.mark.slow
def test_a_server_that_hangs_is_killed_at_stop() -> None:
    server = ValkeyServer().start()
    os.kill(server.pid, signal.SIGSTOP)

    server.stop()

    assert not is_there(server.pid)


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_stop_removes_everything_also_after_a_kill(kind: type[PostgresServer | ValkeyServer]) -> None:
    server = kind().start()
    scratch = server.log.parent
    assert scratch.exists()

    server.kill()
    server.stop()

    assert not scratch.exists()
    assert shared_memory(server.pid) == []
    server.stop()  # once more is no error


def shared_memory(creator: int) -> list[str]:
    """Return the segments of System V shared memory that a process made, where the system lists them."""
    listed = Path("/proc/sysvipc/shm")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return [line for line in lines if line.split()[4] == str(creator)]


def test_a_failed_start_leaves_nothing(folder: Path) -> None:
    script = """
import json
from concurrency_safe.testing import PostgresServer, ServerError
try:
    PostgresServer({"no_such_thing": "1"}).start()
except ServerError as error:
    print(json.dumps(str(error)), flush=True)
"""
    with running(sys.executable, "-c", script, folder=folder) as owner:
        assert "no_such_thing" in says(owner)
        owner.communicate()

        assert left(folder) == []
