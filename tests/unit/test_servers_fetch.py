"""What `make test` says when a server cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import fetch


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take apt and the servers off this machine, and return where they would be unpacked."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(fetch, "SYSTEM_FOLDER", str(tmp_path / "empty"))
    monkeypatch.setattr(fetch, "ROOT", tmp_path / "empty")
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "servers")
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "servers"


def test_a_missing_server_is_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main() == 0

    pgbouncer, rabbitmq = capsys.readouterr().out.splitlines()
    assert pgbouncer.startswith("no PgBouncer here, so the tests behind a pooler are left out")
    assert "apt-get install pgbouncer" in pgbouncer
    assert rabbitmq.startswith("no RabbitMQ here, so the tests on RabbitMQ are left out")
    assert "apt-get install rabbitmq-server" in rabbitmq


def test_a_missing_server_fails_in_ci(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    assert fetch.main() == 1


def test_servers_that_are_there_are_taken_without_a_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = folder / "pgbouncer/usr/sbin/pgbouncer"
    starter = folder / "rabbitmq-server/usr/lib/erlang/erts-13/bin/erlexec"
    for file in (program, starter, folder / "rabbitmq-server/usr/lib/rabbitmq/lib/rabbitmq_server-3/plugins/rabbit"):
        file.parent.mkdir(parents=True)
        file.touch()

    assert fetch.main() == 0
    assert fetch.pgbouncer_program() == program
    assert fetch.rabbitmq_root() == folder / "rabbitmq-server"
    assert capsys.readouterr().out == ""
