"""What a program has started, as far as the system tells: by Linux' /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple


class Process(NamedTuple):
    """A process that runs. `start`: when it began, since its number may be used again."""

    pid: int
    start: int
    parent: int
    group: int
    session: int


def running() -> dict[int, Process]:
    """Give the processes that run, by number, without those that ended and were not waited for; {} without /proc.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    found = {}
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - names are all that is wanted
    except OSError:  # pragma: no cover - macOS
        return {}
    for name in names:
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - quick
                stat = file.read()
        except OSError:  # it has ended meanwhile
            continue
        state, parent, group, session, *more = stat[stat.rindex(b")") + 2 :].split()
        if state not in {b"Z", b"X"}:
            found[int(name)] = Process(int(name), int(more[15]), int(parent), int(group), int(session))
    return found


def with_descendants(known: Iterable[Process], now: dict[int, Process]) -> set[Process]:
    """Give those of `known` that run `now`, and whatever they have started, and so on."""
    tree = {now[each.pid] for each in known if each.pid in now and now[each.pid].start == each.start}
    new = tree
    while new:
        parents = {each.pid for each in new}
        new = {each for each in now.values() if each.parent in parents} - tree
        tree = tree | new
    return tree
