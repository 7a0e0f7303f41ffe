"""What a rule waits for: the vocabulary between the rules (generators) and the loops that drive them.

A rule never blocks. It yields a wait, and is sent True when what it waits for is there, or False when `until`
has passed. Two short loops drive it: one for threads (`postgres.waiting`), one for asyncio (`postgres.loop`).
Only types live here; whoever really waits lives in the layers above.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

#: Seconds that one after the other may use of a thread that many share by turns (an event loop's tasks, greenlets).
TURN = 0.01

#: What a socket should become, as bits.
READ = 1
WRITE = 2


class Gate(Protocol):
    """A door that one waiter stands at, inside this process."""

    def open(self) -> None:
        """Let the waiter through; opening twice is the same as once."""

    def wait(self, timeout: float) -> Any:  # noqa: ANN401 - a truth, or what an event loop awaits to get it
        """Wait up to `timeout` seconds; True when the gate was opened; it is closed again then."""


class SocketWait(NamedTuple):
    """Wait until the socket `fd` is readable or writable, or until the monotonic time `until` (None: for ever)."""

    fd: int
    events: int
    until: float | None


class GateWait(NamedTuple):
    """Wait until `gate` is opened, or until the monotonic time `until` (None: for ever)."""

    gate: Gate
    until: float | None


class CallWait(NamedTuple):
    """Wait until `call()` has returned: something that blocks in C (the look-up of a host name)."""

    call: Callable[[], object]


Wait: TypeAlias = SocketWait | GateWait | CallWait

_T = TypeVar("_T")

#: A rule under way: yields what it waits for, is sent whether it came, returns its result.
Steps: TypeAlias = Generator[Wait, bool, _T]
