"""A short walk of the state machine; `make chaos` takes the long ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.conftest import bare_environment


@pytest.mark.timeout(120)
def test_the_state_machine_finds_no_second_holder_and_nothing_left() -> None:
    """In a process of its own: without Django, and with the collector to itself."""
    command = [sys.executable, "-m", "tests.contract.machine", "--seed", "7", "--seconds", "0", "--examples", "4"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=bare_environment())
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert "steps, no failure" in ran.stdout
