"""Which process this is, without a system call each time: an acquisition asks it several times.

What forks past Python's `os.fork` (a C library that never tells the interpreter) is not seen, and breaks more than us.
"""

from __future__ import annotations

import os

#: The number of this process.
pid = os.getpid()


def _begin_child() -> None:
    global pid  # noqa: PLW0603 - one a process
    pid = os.getpid()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_begin_child)
