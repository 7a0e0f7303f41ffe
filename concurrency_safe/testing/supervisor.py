"""Keep one server alive exactly as long as the process that asked for it.

This file is run as a script, by its path: standard library only, nothing of this package.

The owner talks to it over a socket that is its standard input: a JSON request a line, a JSON reply
a line. The end of that socket means that the owner is gone, by whatever death, so the server is
ended and the scratch directory removed. A death signal of the kernel (PDEATHSIG) alone would not
do: it exists on Linux only, fires when the starting *thread* ends, and removes no directory. Here
it is the second line of defence, for the case that this process itself is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NoReturn

#: The user that servers run as for root, by number, so it need not have a name or an entry.
NOBODY = 65534
#: Seconds that a server has for its stop signal.
STOP_LIMIT = 5.0
#: Seconds that a dead server's children have to notice. Those that wait for something do at once.
ORPHAN_LIMIT = 1.0
#: Seconds between two looks at a child that is waited for.
CHILD_PERIOD = 0.01
#: Longest base of a scratch directory; a unix socket's path has 107 bytes at most, 103 on macOS.
BASE_LIMIT = 60
#: Characters of a command's output that are worth reporting, from its end.
OUTPUT_LIMIT = 4000

# <linux/prctl.h> and <linux/sched.h>
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUSER = 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


class OwnerGoneError(Exception):
    """The process that this supervisor serves has ended."""


class Supervisor:
    """One server, the commands around it and a scratch directory, for one owner."""

    def __init__(self, owner: socket.socket, scratch: Path) -> None:
        self.owner = owner
        self.scratch = scratch
        self.log = (scratch / "log").open("ab")
        self.server: subprocess.Popen[bytes] | None = None
        self.stop_signal = int(signal.SIGTERM)
        # A server that ends by itself leaves no zombie behind.
        signal.signal(signal.SIGCHLD, lambda *_: self.server and self.server.poll())

    def serve(self) -> NoReturn:
        """Answer the owner's requests until it is gone, which raises OwnerGoneError."""
        received = b""
        while True:
            self._look_at_owner(None)
            received += self.owner.recv(65536)
            *lines, received = received.split(b"\n")
            for line in lines:
                self._answer(**json.loads(line))

    def close(self) -> None:
        """End the server, if need be by force, and remove the scratch directory."""
        if self.server is not None:
            self.server.send_signal(self.stop_signal)
            try:
                self.server.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        end_orphans()
        remove(self.scratch)

    # Requests

    def do_run(self, argv: list[str], env: dict[str, str], identity: str, timeout: float) -> dict[str, Any]:
        """Run a command to its end."""
        with tempfile.TemporaryFile() as output:
            child = popen(argv, env, identity, signal.SIGKILL, output)
            try:
                code = self._wait(child, timeout)
            finally:
                child.kill()
                child.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")[-OUTPUT_LIMIT:]
        return {"code": code, "output": text}

    def do_spawn(self, argv: list[str], env: dict[str, str], identity: str, stop_signal: int) -> dict[str, Any]:
        """Start the server."""
        self.stop_signal = stop_signal
        self.server = popen(argv, env, identity, stop_signal, self.log)
        return {"pid": self.server.pid}

    def do_signal(self, signum: int) -> dict[str, Any]:
        """Send the server a signal, unless it has ended."""
        if self.server is not None:
            self.server.send_signal(signum)
        return {}

    def do_wait(self, timeout: float) -> dict[str, Any]:
        """Wait for the end of the server and of its own children."""
        code = 0 if self.server is None else self._wait(self.server, timeout)
        if code is not None:
            end_orphans()
        return {"code": code}

    def do_give(self, path: str) -> dict[str, Any]:
        """Give a directory of ours to the user that servers run as."""
        for folder, folders, files in os.walk(path):
            for name in (".", *folders, *files):
                os.chown(Path(folder, name), NOBODY, NOBODY, follow_symlinks=False)
        return {}

    def do_scratch(self) -> dict[str, Any]:
        """Say where the scratch directory is."""
        return {"path": str(self.scratch)}

    def _answer(self, number: int, do: str, **arguments: object) -> None:
        try:
            reply = getattr(self, f"do_{do}")(**arguments)
        except (OSError, subprocess.SubprocessError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        try:
            self.owner.sendall(json.dumps({"number": number, **reply}).encode() + b"\n")
        except OSError as error:
            raise OwnerGoneError from error

    # Waiting

    def _wait(self, child: subprocess.Popen[bytes], timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        while child.poll() is None:
            if time.monotonic() > deadline:
                return None
            self._look_at_owner(CHILD_PERIOD)
        return child.returncode

    def _look_at_owner(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds for a request; raise OwnerGoneError at the owner's end."""
        speaks, _, _ = select.select([self.owner], [], [], timeout)
        try:
            ended = bool(speaks) and not self.owner.recv(1, socket.MSG_PEEK)
        except ConnectionResetError as error:  # it died without having read our last reply
            raise OwnerGoneError from error
        if ended:
            raise OwnerGoneError


def popen(
    argv: list[str], env: dict[str, str], identity: str, death_signal: int, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a child that the kernel ends should this process be killed."""

    def enter() -> None:
        if identity == "namespace":
            map_to_nobody()
        if sys.platform == "linux":
            LIBC.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)

    user: dict[str, Any] = {}
    if identity == "nobody":
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return subprocess.Popen(
        argv,
        env=env,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=enter,  # noqa: PLW1509  this process has one thread
        **user,
    )


def map_to_nobody() -> None:
    """Show this process, which is root's, to itself as a plain user.

    PostgreSQL refuses to run as root. In a user namespace it may, without another user's rights
    on directories: it goes on to read what root's files are, also below a directory of mode 0700.
    """
    user, group = os.geteuid(), os.getegid()
    if LIBC.unshare(CLONE_NEWUSER) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")


def end_orphans() -> None:
    """Wait until the children that a dead server left to us are gone.

    They end by themselves, as a backend watches its postmaster; one that is too busy for that is
    killed. A restarted server must not meet them.
    """
    deadline = time.monotonic() + ORPHAN_LIMIT
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > deadline:
                pid = os.getpid()
                for child in Path(f"/proc/self/task/{pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(CHILD_PERIOD)  # noqa: TID251  a look with a limit


def remove(scratch: Path) -> None:
    """Remove the scratch directory, though a last write may put a file into it meanwhile."""
    for _ in range(5):
        shutil.rmtree(scratch, ignore_errors=True)
        if not scratch.exists():
            return
        time.sleep(CHILD_PERIOD)  # noqa: TID251  a look with a limit


def make_scratch(name: str) -> Path:
    """Make a private directory whose path is short enough for a unix socket in it."""
    base = tempfile.gettempdir()
    if len(base) > BASE_LIMIT:
        base = "/tmp"  # noqa: S108  mkdtemp makes a directory of mode 0700 there
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))


def end_softly(*_: object) -> NoReturn:
    """Take a signal as the owner's end."""
    raise OwnerGoneError


def main() -> None:
    """Serve the owner that is at the other end of standard input."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, end_softly)
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.umask(0o077)
    # Children get /dev/null as their standard input: only this process and the owner hold it.
    owner = socket.socket(fileno=os.dup(0))
    scratch = make_scratch(sys.argv[1])
    supervisor = Supervisor(owner, scratch)
    os.dup2(supervisor.log.fileno(), 2)
    try:
        supervisor.serve()
    except OwnerGoneError:
        pass
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        supervisor.close()


if __name__ == "__main__":
    main()
