"""Get the servers that the tests use and no wheel brings: PgBouncer and RabbitMQ.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Where servers are unpacked that the system does not have, a folder each.
FOLDER = Path(os.environ.get("CONCURRENCY_SAFE_SERVERS") or Path(__file__).parents[2] / ".servers").absolute()
#: The system's own root, where packages are when they are installed.
ROOT = Path("/")
#: Where Debian has it, and a plain user's PATH does not lead.
SYSTEM_FOLDER = "/usr/sbin"
#: How often packages that packages need are looked for. PgBouncer takes one round on Debian 12, RabbitMQ three.
ROUNDS = 6
#: Seconds that a command may take; the longest reads the distribution's lists over the network.
COMMAND_LIMIT = 120.0


@dataclass(frozen=True)
class Wanted:
    """A server, the package that has it, and how it is found and proved to run.

    Attributes:
        find: returns where it is, of the system or fetched; None: there is none.
        proof: returns a harmless command of what was unpacked into a folder, and variables for it.
        left_out: the tests that can't run without it.
        how_to_install: said when there is no other way.
    """

    title: str
    package: str
    find: Callable[[], Path | None]
    proof: Callable[[Path], tuple[list[str], dict[str, str]]]
    left_out: str
    how_to_install: str

    @property
    def folder(self) -> Path:
        """Where it is unpacked."""
        return FOLDER / self.package


def main() -> int:
    """Return the exit status: 1 when a server can't be had and this is CI, where it has to be."""
    missing = 0
    for wanted in WANTED:
        if wanted.find() is not None:
            continue
        try:
            fetch(wanted)
        except (OSError, subprocess.SubprocessError) as error:
            print(
                f"no {wanted.title} here, so the tests {wanted.left_out} are left out ({reason(error)}); "
                f"{wanted.how_to_install}"
            )
            missing += 1
        else:
            print(f"fetched {wanted.title} into {wanted.folder}")
    return 1 if missing and os.environ.get("CI") else 0


def pgbouncer_program() -> Path | None:
    """Return the path of PgBouncer, of the system or fetched; None: there is none."""
    system = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDER}")
    fetched = FOLDER / "pgbouncer/usr/sbin/pgbouncer"
    if system:
        return Path(system)
    return fetched if fetched.exists() else None


def pgbouncer_proof(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return a command that tells the version."""
    return [str(folder / "usr/sbin/pgbouncer"), "--version"], {}


def rabbitmq_root() -> Path | None:
    """Return the folder below which RabbitMQ and its Erlang lie as in the system's root; None: there is none."""
    for root in (ROOT, FOLDER / "rabbitmq-server"):
        if any(root.glob(f"{RABBITMQ}/plugins")) and any(root.glob(ERLANG)):
            return root
    return None


def erlang(root: Path) -> tuple[Path, dict[str, str]]:
    """Return Erlang's starter below `root`, and the variables by which it is at home wherever it was unpacked.

    The script `erl` sets the same ones, to where the package would have been installed.
    """
    starter = max(root.glob(ERLANG))
    return starter, {
        "ROOTDIR": str(root / "usr/lib/erlang"),
        "BINDIR": str(starter.parent),
        "EMU": "beam",
        "PROGNAME": "erl",
        "PATH": f"{starter.parent}:{os.environ.get('PATH', os.defpath)}",
    }


def rabbitmq_proof(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return a command that starts Erlang, with the one library of the system's that RabbitMQ needs."""
    starter, environment = erlang(folder)
    return [str(starter), "-noinput", "-eval", "ok = crypto:start(), halt()."], environment


#: Where Debian's packages have them.
RABBITMQ = "usr/lib/rabbitmq/lib/rabbitmq_server-*"
ERLANG = "usr/lib/erlang/erts-*/bin/erlexec"

WANTED = (
    Wanted(
        "PgBouncer",
        "pgbouncer",
        pgbouncer_program,
        pgbouncer_proof,
        "behind a pooler",
        "apt-get install pgbouncer, or on macOS brew install pgbouncer, brings it",
    ),
    Wanted(
        "RabbitMQ",
        "rabbitmq-server",
        rabbitmq_root,
        rabbitmq_proof,
        "on RabbitMQ",
        "apt-get install rabbitmq-server brings it, or RABBITMQ_URL=amqp://... names a running one",
    ),
)


def library_path(folder: Path) -> str:
    """Return the folders of the libraries in `folder`, as LD_LIBRARY_PATH takes them."""
    return ":".join(sorted({str(library.parent) for library in folder.glob("**/*.so.*")}))


def fetch(wanted: Wanted) -> None:
    """Unpack a server, with the libraries that this system lacks for it, into its folder."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            unpacked = unpack(wanted, work / "system", [])
        except subprocess.CalledProcessError:
            # The system's lists of packages are empty, as in a container, or too old.
            unpacked = unpack(wanted, work / "own", own_lists(work))
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=FOLDER))
        part.chmod(0o755)
        shutil.copytree(unpacked, part, symlinks=True, dirs_exist_ok=True)
        # In one step, so that a run beside this one never sees half of it.
        part.rename(wanted.folder)


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


def unpack(wanted: Wanted, work: Path, options: list[str]) -> Path:
    """Return a folder with a server that runs, with the packages that it lacks and those that these lack."""
    unpacked = work / "unpacked"
    unpacked.mkdir(parents=True)
    packages, taken = {wanted.package}, set[str]()
    for _ in range(ROUNDS):
        before = set(work.glob("*.deb"))
        run("apt-get", *options, "-q", "download", *sorted(packages), cwd=work)
        archives = set(work.glob("*.deb")) - before
        for archive in archives:
            run("dpkg-deb", "-x", str(archive), str(unpacked), cwd=work)
        taken |= packages
        packages = {name for archive in archives for name in missing_packages(archive)} - taken
        if not packages:
            break
    command, environment = wanted.proof(unpacked)
    run(*command, cwd=work, env={**os.environ, "LD_LIBRARY_PATH": library_path(unpacked), **environment})
    return unpacked


def missing_packages(archive: Path) -> set[str]:
    """Return the packages that a package needs here: libraries that this system lacks, and all of Erlang.

    Erlang's parts find each other by their place, so they come together, whatever is installed.
    """
    depends = run("dpkg-deb", "-f", str(archive), "Depends", cwd=archive.parent)
    # "libevent-2.1-7 (>= 2.1.8-stable) | other, libssl3": the first of alternatives. Never the C
    # library: what runs here has one, and a second beside it runs nothing.
    names = {re.split(r"[\s(|:]", word.strip())[0] for word in depends.split(",")}
    libraries = {name for name in names if name.startswith("lib") and name != "libc6" and not is_installed(name)}
    return libraries | {name for name in names if name.startswith("erlang-")}


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
