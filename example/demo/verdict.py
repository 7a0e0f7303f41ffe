"""What a door did, and which promises that breaks. Pure values: no servers, no Django, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class Row:
    """One door's line of the table."""

    door: str
    guarded: bool
    #: Items on the shelf before and after.
    stock: int
    left: int
    requests: int
    #: Requests that were answered "sold" and "sold out"; the rest failed.
    sold: int
    sold_out: int
    #: Sales in the database's log, and how many of them began before an earlier one had ended.
    logged: int
    overlaps: int
    #: Times a request met the section taken; None where the door can't notice.
    conflicts: int | None
    seconds: float
    #: What the first failed request said.
    trouble: str | None = None

    @property
    def answered(self) -> int:
        """Requests that ended in an answer."""
        return self.sold + self.sold_out

    @property
    def lost(self) -> int:
        """Sales that another sale overwrote: the stock went down by fewer than were sold."""
        return self.sold - (self.stock - self.left)


def overlaps(sales: Iterable[tuple[datetime, datetime]]) -> int:
    """Count the sales that began before an earlier one had ended."""
    count = 0
    latest: datetime | None = None
    for started, ended in sorted(sales):
        if latest is not None and started < latest:
            count += 1
        latest = ended if latest is None else max(latest, ended)
    return count


def broken_promises(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each promise that a door broke; none at all is a success."""
    broken = [f"{row.door}: {fault}" for row in rows for fault in _faults(row)]
    for guarded, kind in ((False, "an unguarded"), (True, "a guarded")):
        if not any(row.guarded is guarded for row in rows):
            broken.append(f"the table lacks {kind} door")
    return broken


def _faults(row: Row) -> Iterator[str]:
    if row.answered != row.requests:
        why = f" ({row.trouble})" if row.trouble else ""
        yield f"{row.answered} of {row.requests} requests were answered{why}"
    if row.logged != row.sold:
        yield f"{row.sold} answers say sold, and the log has {row.logged} sales"
    yield from _guarded_faults(row) if row.guarded else _unguarded_faults(row)


def _unguarded_faults(row: Row) -> Iterator[str]:
    if row.lost <= 0:
        yield "no update was lost, so the race did not show"
    if row.overlaps == 0:
        yield "no sales overlapped, so the race did not show"


def _guarded_faults(row: Row) -> Iterator[str]:
    wanted = min(row.stock, row.answered)
    if row.lost:
        change = f"the stock went from {row.stock} to {row.left}"
        yield f"{row.sold} were sold, but {change}: {row.lost} lost"
    if row.sold != wanted or not row.sold:
        asked = f"{row.answered} requests with {row.stock} in stock"
        yield f"{row.sold} were sold to {asked}, not {wanted}"
    if row.overlaps:
        yield f"{row.overlaps} sales overlapped another one"
    if not row.conflicts:
        yield "no request met another one, so nothing was shown"
