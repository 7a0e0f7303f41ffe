"""A PostgreSQL server of our own, for tests and demos: started, crashed, restarted at will."""

from __future__ import annotations

import ctypes
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from concurrency_safe.testing.binaries import postgres_folder
from concurrency_safe.testing.process import ServerError
from concurrency_safe.testing.server import Server

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

#: What differs from PostgreSQL's own defaults. The data live for a test, so nothing is synced, and
#: shared memory is kept in files of the data directory, which go with it also after a crash.
DEFAULTS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "on",
    "dynamic_shared_memory_type": "mmap",
}
#: First line of every postgresql.conf that we wrote, and so of every directory that is ours.
MARK = "# written by concurrency_safe.testing; changes are lost at the next start"
#: Lines of postmaster.pid from the moment on when the postmaster listens.
LOCK_FILE_LINES = 8
#: Removes a segment of shared memory; <sys/ipc.h>, the same number everywhere.
IPC_RMID = 0
#: How PostgreSQL is told to stop.
STOP_SIGNALS: Mapping[str, int] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


class PostgresServer(Server):
    """A PostgreSQL server on a free port of 127.0.0.1, gone when this process is gone.

    It runs for root as for a plain user; no user is created and no directory opened for it. It asks
    for no password: whoever can connect to 127.0.0.1 is its superuser, and can do to the files of
    the user who started it what that user can. So not on a machine that you share.

    Args:
        settings: settings of postgresql.conf, over `DEFAULTS`. Change the attribute `settings` and
            call `restart()` to have others.
        data_dir: where the data are and stay after `stop()`. None: in a temporary directory, which
            `stop()` and our death remove.
        port: the port to take; None takes a free one.
    """

    _name = "postgres"
    # An immediate shutdown: what it would save is removed, or recovered at the next start.
    _stop_signal = signal.SIGQUIT

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        port: int | None = None,
    ) -> None:
        super().__init__(port)
        self.settings = {**DEFAULTS, **(settings or {})}
        self._kept_dir = None if data_dir is None else Path(data_dir).absolute()
        self._primary: PostgresServer | None = None

    # Where it is

    @property
    def dsn(self) -> str:
        """The URL of the database `postgres`, over TCP."""
        return self.database_dsn("postgres")

    @property
    def socket_dsn(self) -> str:
        """The URL of the database `postgres`, over the unix socket."""
        folder = quote(str(self._socket_dir), safe="")
        return f"postgresql://postgres@/postgres?host={folder}&port={self.port}"

    @property
    def data_dir(self) -> Path:
        """The data directory."""
        return self._kept_dir or self._supervised.scratch / "data"

    def database_dsn(self, name: str) -> str:
        """Return the URL of a database of this server, whether it exists or not."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{quote(name, safe='')}"

    # What can be done with it

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        self._run("createdb", *self._connection_options, "--", name)
        return self.database_dsn(name)

    def kill(self) -> None:
        """Kill the postmaster as a crash does (SIGKILL) and return when its backends are gone too.

        Follow with `start()` to have it back.
        """
        lock_file = self._lock_file()
        super().kill()
        if lock_file:
            # A start in the same directory would remove what a killed postmaster leaves of System V shared memory,
            # but there may be none.
            ctypes.CDLL(None).shmctl(int(lock_file[6].split()[1]), IPC_RMID, None)

    def restart(self, mode: str = "fast") -> None:
        """Restart the server on the same port with the same data.

        Args:
            mode: "fast" rolls back and disconnects everyone, "immediate" is a crash with notice
                (recovery follows), "smart" waits until all clients have left.
        """
        if mode not in STOP_SIGNALS:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(STOP_SIGNALS)}")
        self._end(STOP_SIGNALS[mode])
        self.start()

    def standby(self, settings: Mapping[str, str] | None = None) -> PostgresServer:
        """Start a hot standby that streams from this server, and return it.

        It answers reading queries, and `pg_is_in_recovery()` with true, until `promote()`.

        Args:
            settings: settings of the standby, over those of this server.
        """
        standby = PostgresServer({**self.settings, **(settings or {})})
        standby._primary = self
        return standby.start()

    def promote(self) -> None:
        """Make a standby a primary, and return when it takes writes."""
        self._run("pg_ctl", "promote", "--wait", "--silent", "-D", self.data_dir)

    def stop(self) -> None:
        """End the server and remove its data, unless `data_dir` was given."""
        if self._kept_dir is not None and self.running:
            self._end(signal.SIGINT)
        super().stop()

    # How

    @property
    def _socket_dir(self) -> Path:
        return self._supervised.scratch

    @property
    def _connection_options(self) -> list[str | Path]:
        return ["-h", self._socket_dir, "-p", str(self.port), "-U", "postgres"]

    def _prepare(self) -> None:
        self._folder = postgres_folder()
        self._become_plain_user()
        if self._kept_dir is not None:
            self._prepare_kept_dir(self._kept_dir)
        if self._primary is not None:
            self._copy_primary(self._primary)
        elif not (self.data_dir / "PG_VERSION").exists():
            options = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
            self._run("initdb", "-D", self.data_dir, *options)

    def _become_plain_user(self) -> None:
        identity = self._try_identities()
        if identity is None:
            # The programs lie below a directory that only root may enter.
            self._folder = self._copy_programs()
            identity = self._try_identities()
        if identity in (None, "nobody"):
            self._supervised.give(self._supervised.scratch)
            identity = self._try_identities()
        if identity is None:
            raise ServerError(
                "PostgreSQL does not run as root, and here root can become no other user: "
                "start this program as a plain user, or set DATABASE_URL"
            )
        self._identity = identity

    def _try_identities(self) -> str | None:
        return self._find_identity(self._folder / "postgres", "--version")

    def _prepare_kept_dir(self, kept: Path) -> None:
        if (kept / "PG_VERSION").exists():
            with (kept / "postgresql.conf").open() as conf:
                if conf.readline().rstrip() != MARK:
                    raise ServerError(
                        f"data_dir {str(kept)!r} has a cluster that PostgresServer did not make; "
                        "take an empty directory"
                    )
        kept.mkdir(parents=True, exist_ok=True)
        if self._identity == "nobody":
            self._supervised.give(kept)

    def _copy_primary(self, primary: PostgresServer) -> None:
        options = ("-D", self.data_dir, "--checkpoint=fast", "--no-sync", "--write-recovery-conf")
        self._run("pg_basebackup", *options, *primary._connection_options)

    def _copy_programs(self) -> Path:
        prefix = self._folder.resolve().parent
        copy = self._supervised.scratch / "copy" / prefix.parent.name / prefix.name
        shutil.copytree(prefix, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        # The wheel's programs look for these at their place beside the package.
        libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, copy.parent.with_name(libraries.name), symlinks=True)
        return copy / self._folder.name

    def _run(self, program: str, *arguments: str | Path) -> str:
        return self._supervised.run(
            [self._folder / program, *arguments], env=self._environment(), identity=self._identity
        )

    def _command(self) -> list[str | Path]:
        self._write_conf()
        options: list[str | Path] = ["-D", self.data_dir, "-p", str(self.port)]
        return [self._folder / "postgres", *options, "-k", self._socket_dir]

    def _write_conf(self) -> None:
        lines = [MARK]
        for name, value in self.settings.items():
            escaped = value.replace("\\", "\\\\").replace("'", "''")
            lines.append(f"{name} = '{escaped}'")
        (self.data_dir / "postgresql.conf").write_text("\n".join(lines) + "\n")

    def _is_ready(self) -> bool:
        """Read what pg_ctl reads: the postmaster itself notes in its lock file that it is ready."""
        lines = self._lock_file()
        return bool(lines) and lines[-1].strip() == "ready"

    def _lock_file(self) -> list[str]:
        """Return postmaster.pid when it is complete and of the process that we started, else nothing.

        Source: src/include/utils/pidfile.h
        """
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []
        return lines if len(lines) == LOCK_FILE_LINES and lines[0] == str(self.pid) else []
