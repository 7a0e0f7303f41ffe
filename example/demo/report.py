"""How the demo speaks: progress lines, the table, its legend, and the same as JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from example.demo.verdict import Row

HEADINGS = ("door", "requests", "sold", "stock", "lost", "conflicts", "overlaps", "seconds")

LEGEND = """\
sold       requests that were told so; the others came when the shelf was empty
lost       sold, minus what the stock went down by: sales that another one overwrote
conflicts  how often a request met the section taken. Row lock, decorator, script: it waited more
           than 10 ms, its first connection included. 409: it was told to come back. Task, actor: it
           went back to the queue. Cron: a host left the job to another one. An unguarded door
           notices nothing.
overlaps   sales that began before an earlier one had ended, by the log in the database"""

_began = time.monotonic()


def say(text: str = "") -> None:
    """Print one line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def step(text: str) -> None:
    """Print one line of progress, with the seconds since the start."""
    say(f"{time.monotonic() - _began:5.1f} s  {text}")


def table(rows: Sequence[Row]) -> str:
    """Return the table as plain text, at most 100 columns wide."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADINGS))]
    texts = [_line(cells, widths) for cells in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def write_json(path: Path, rows: Sequence[Row], broken: Sequence[str]) -> None:
    """Write the table and the verdict for programs."""
    report = {
        "ok": not broken,
        "broken": list(broken),
        "seconds": round(time.monotonic() - _began, 3),
        "rows": [{**asdict(row), "lost": row.lost, "answered": row.answered} for row in rows],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.door,
        str(row.requests),
        str(row.sold),
        f"{row.stock} -> {row.left}",
        str(row.lost),
        "-" if row.conflicts is None else str(row.conflicts),
        str(row.overlaps),
        f"{row.seconds:.1f}",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest])
