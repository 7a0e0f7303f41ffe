"""How long a look at a socket blocks."""

from __future__ import annotations

import select
import socket

import pytest

from concurrency_safe.core.steps import READ
from concurrency_safe.postgres.waiting import wait_socket


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0, 0), (0.0001, 1), (0.05, 50)])
def test_a_look_blocks_as_long_as_it_is_told(
    seconds: float, milliseconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline ends without spinning; a look without waiting, at every assert_locked, costs none."""
    told = []

    class Poll:
        def register(self, fd: int, events: int) -> None: ...
        def poll(self, timeout: float) -> list[tuple[int, int]]:
            told.append(timeout)
            return []

    monkeypatch.setattr(select, "poll", Poll)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not wait_socket(ours.fileno(), READ, seconds)

    assert milliseconds <= told[0] < milliseconds + 1 if milliseconds else told == [0]
