"""What `locks` and `doctor` show, as tables for people and as JSON for scripts."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError('rich is not installed; run: pip install "django-concurrency-safe[cli]"') from error

from concurrency_safe.conf import get_settings
from concurrency_safe.core.keys import Rendered, lock_key
from concurrency_safe.postgres.census import Census, LockRow, take_census
from concurrency_safe.spaces import ask

if TYPE_CHECKING:
    from typing import Any

#: Seconds between two looks of `locks --watch`.
WATCH = 1.0

#: Seconds of the units in which a duration is shown.
MINUTE, HOUR, DAY = 60, 3600, 86400


def census(names: Sequence[str]) -> Census:
    """Look who holds and who awaits what; `names`: keys whose texts nobody else may be able to tell.

    Raises: LockUnavailable, ConfigurationError, KeyTemplateError.
    """
    namespace = get_settings().namespace
    keys = [lock_key(Rendered(name), namespace) for name in names]
    return ask(lambda backend, footing: take_census(backend, footing, keys))


def as_json(taken: Census) -> str:
    """Give a list of objects, one a lock; what isn't known is null."""
    return json.dumps([_object(row) for row in taken.locks], indent=2)


def _object(row: LockRow) -> dict[str, Any]:
    return {
        "key": row.key,
        "number": row.number,
        "state": "held" if row.held else "waiting",
        "mode": "shared" if row.shared else "exclusive",
        "host": row.host or None,
        "pid": row.pid,
        "backend_pid": row.backend_pid,
        "application": row.application,
        "work": row.work or None,
        "since": None if row.since is None else datetime.fromtimestamp(row.since, timezone.utc).isoformat(),
    }


def as_table(taken: Census) -> Group:
    """Give a table: each key with its holders, then those who wait, the first in the queue first."""
    waiting = sum(not row.held for row in taken.locks)
    share = 100 * taken.used / taken.room
    summary = (
        f"{len(taken.locks) - waiting} held, {waiting} waiting; "
        f"the server's lock table holds {taken.used} of about {taken.room} ({share:.0f} %)"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("key", overflow="fold", ratio=3)
    table.add_column("state", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("host", overflow="fold", ratio=2)
    table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("server pid", justify="right", no_wrap=True)
    table.add_column("task", overflow="fold", ratio=2)
    last = None
    for row in sorted(taken.locks, key=lambda row: (row.key is None, row.key or "", row.number)):
        key = f"#{row.number}" if row.key is None else row.key
        state = ("held" if row.held else "waiting") + (", shared" if row.shared else "")
        seconds = "?" if row.since is None else duration(taken.now - row.since)
        table.add_row(
            Text("" if key == last else _shown(key)),
            Text(state, style="" if row.held else "yellow"),
            seconds,
            Text(_shown(row.host)),
            "" if row.pid is None else str(row.pid),
            str(row.backend_pid),
            Text(_shown(row.work)),
        )
        last = key
    return Group(table, Text(summary, style="dim")) if taken.locks else Group(Text(summary, style="dim"))


def _shown(text: str) -> str:
    """Give `text` without what a terminal would take for a command."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def duration(seconds: float) -> str:
    """Give a duration in its two largest units."""
    if seconds < MINUTE:
        return f"{max(seconds, 0):.1f}s"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f}m{seconds % MINUTE:02.0f}s"
    if seconds < DAY:
        return f"{seconds // HOUR:.0f}h{seconds % HOUR // MINUTE:02.0f}m"
    return f"{seconds // DAY:.0f}d{seconds % DAY // HOUR:02.0f}h"


def watch(names: Sequence[str], *, as_lines: bool) -> None:
    """Show all locks again and again, until somebody interrupts; `as_lines`: as JSON, a list a line.

    Raises: LockUnavailable, ConfigurationError, KeyTemplateError.
    """
    pause = threading.Event()  # never set
    console = Console()
    with suppress(KeyboardInterrupt):
        if as_lines:
            while True:
                console.out(json.dumps([_object(row) for row in census(names).locks]), highlight=False)
                pause.wait(WATCH)
        with Live(as_table(census(names)), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                pause.wait(WATCH)
                live.update(as_table(census(names)), refresh=True)


def show(names: Sequence[str]) -> None:
    """Print all locks once. Raises: see `watch`."""
    Console().print(as_table(census(names)))
