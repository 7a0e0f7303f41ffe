"""What `make test` says when PgBouncer cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import fetch


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take apt and PgBouncer off this machine, and return where it would be unpacked."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(fetch, "SYSTEM_FOLDER", str(tmp_path / "empty"))
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "pgbouncer")
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "pgbouncer"


def test_a_missing_pgbouncer_is_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main() == 0

    said = capsys.readouterr().out
    assert said.startswith("no PgBouncer here, so the tests behind a pooler are left out")
    assert "apt-get install pgbouncer" in said
    assert said.count("\n") == 1


def test_a_missing_pgbouncer_fails_in_ci(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    assert fetch.main() == 1


def test_a_pgbouncer_that_is_there_is_taken_without_a_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = folder / "usr/sbin/pgbouncer"
    program.parent.mkdir(parents=True)
    program.touch()

    assert fetch.main() == 0
    assert fetch.pgbouncer_program() == program
    assert capsys.readouterr().out == ""
