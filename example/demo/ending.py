"""How the demo can be told to end: by signals, and by its time limit."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from example.demo.processes import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def arrange() -> None:
    """Turn signals into exceptions, so that whatever was started is stopped on the way out."""
    for number in SIGNALS:
        signal.signal(number, _exit)


def ignore_signals() -> None:
    """Let nothing interrupt the stop, which takes a few seconds at most."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `DemoError` in the block when it takes longer than `seconds`."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise DemoError(f"the doors took longer than {seconds} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
