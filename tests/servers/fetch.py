"""Get the server that the tests use and no wheel brings: PgBouncer.

Run by `make test`. Nothing is installed and no rights are needed: packages of Debian or Ubuntu are
unpacked into `.servers`, where the tests look for what PATH does not have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: Where PgBouncer is unpacked when the system does not have it.
FOLDER = (
    Path(os.environ.get("CONCURRENCY_SAFE_SERVERS") or Path(__file__).parents[2] / ".servers") / "pgbouncer"
).absolute()
#: Said when there is no other way, after the reason.
HOW_TO_INSTALL = "apt-get install pgbouncer, or on macOS brew install pgbouncer, brings it"
#: Where Debian has it, and a plain user's PATH does not lead.
SYSTEM_FOLDER = "/usr/sbin"
#: How often libraries of libraries are looked for. One round is enough on Debian 12.
ROUNDS = 4
#: Seconds that a command may take; the longest reads the distribution's lists over the network.
COMMAND_LIMIT = 120.0


def main() -> int:
    """Return the exit status: 1 when PgBouncer can't be had and this is CI, where it has to be."""
    if pgbouncer_program() is not None:
        return 0
    try:
        fetch()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no PgBouncer here, so the tests behind a pooler are left out ({reason(error)}); {HOW_TO_INSTALL}")
        return 1 if os.environ.get("CI") else 0
    print(f"fetched PgBouncer into {FOLDER}")
    return 0


def pgbouncer_program() -> Path | None:
    """Return the path of PgBouncer, of the system or fetched; None: there is none."""
    system = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDER}")
    fetched = FOLDER / "usr/sbin/pgbouncer"
    if system:
        return Path(system)
    return fetched if fetched.exists() else None


def library_path(folder: Path) -> str:
    """Return the folders of the libraries in `folder`, as LD_LIBRARY_PATH takes them."""
    return ":".join(sorted({str(library.parent) for library in folder.glob("**/*.so.*")}))


def fetch() -> None:
    """Unpack PgBouncer, with the libraries that this system lacks for it, into FOLDER."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            unpacked = unpack(work / "system", [])
        except subprocess.CalledProcessError:
            # The system's lists of packages are empty, as in a container, or too old.
            unpacked = unpack(work / "own", own_lists(work))
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=FOLDER.parent))
        part.chmod(0o755)
        shutil.copytree(unpacked, part, symlinks=True, dirs_exist_ok=True)
        # In one step, so that a run beside this one never sees half of it.
        part.rename(FOLDER)


def own_lists(work: Path) -> list[str]:
    """Return options that give apt lists of packages of our own, which needs no root."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    settings = {
        "Dir::State": str(work / "state"),
        "Dir::State::lists": str(work / "state/lists"),
        "Dir::Cache": str(work / "cache"),
        "Dir::State::status": "/var/lib/dpkg/status",
        "APT::Sandbox::User": "root",
        "Acquire::http::Timeout": "20",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *options, "-q", "update", cwd=work)
    return options


def unpack(work: Path, options: list[str]) -> Path:
    """Return a folder with PgBouncer that runs, with the libraries that it lacks and those that these lack."""
    unpacked = work / "unpacked"
    unpacked.mkdir(parents=True)
    wanted = {"pgbouncer"}
    for _ in range(ROUNDS):
        before = set(work.glob("*.deb"))
        run("apt-get", *options, "-q", "download", *sorted(wanted), cwd=work)
        archives = set(work.glob("*.deb")) - before
        for archive in archives:
            run("dpkg-deb", "-x", str(archive), str(unpacked), cwd=work)
        wanted = {name for archive in archives for name in missing_libraries(archive)}
        if not wanted:
            break
    environment = {**os.environ, "LD_LIBRARY_PATH": library_path(unpacked)}
    run(str(unpacked / "usr/sbin/pgbouncer"), "--version", cwd=work, env=environment)
    return unpacked


def missing_libraries(archive: Path) -> set[str]:
    """Return the libraries that a package depends on and this system does not have."""
    depends = run("dpkg-deb", "-f", str(archive), "Depends", cwd=archive.parent)
    # "libevent-2.1-7 (>= 2.1.8-stable) | other, libssl3": the first of alternatives. Never the C
    # library: what runs here has one, and a second beside it runs nothing.
    names = {re.split(r"[\s(|:]", word.strip())[0] for word in depends.split(",")}
    libraries = {name for name in names if name.startswith("lib") and name != "libc6"}
    return {name for name in libraries if not is_installed(name)}


def is_installed(package: str) -> bool:
    """Tell whether the system has a package."""
    try:
        status = run("dpkg-query", "-W", "-f", "${db:Status-Status}", package, cwd=Path("/"))
    except subprocess.CalledProcessError:
        return False
    return "installed" in status.split()


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output.

    Raises: subprocess.SubprocessError: it failed, or took too long.
    """
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT,
    ).stdout


def reason(error: Exception) -> str:
    """Return one line that says why a command failed."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        return f"{error.cmd[0]}: {lines[-1] if lines else f'exit status {error.returncode}'}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
