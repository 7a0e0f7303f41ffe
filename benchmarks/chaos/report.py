"""What a run of chaos leaves: a page to read, and a picture of its time."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from benchmarks.chaos.judge import Fault, Run

WIDTH, LANE, LEFT = 1400, 26, 150
COLOURS = {"completed": "#4c9f70", "told of a loss": "#e0a030", "killed": "#888888", "neither": "#c0392b"}


def markdown(facts: dict[str, Any], drawing: str) -> str:
    """Write the page."""
    lines = [
        f"# Chaos, seed {facts['seed']}, {facts['seconds']:.0f} s",
        "",
        "Celery on RabbitMQ, Dramatiq on Valkey. To repeat it:",
        f"`python -m benchmarks.chaos --seed {facts['seed']} --seconds {facts['seconds']:.0f}`",
        "",
        f"**{'Nothing was wrong' if not facts['wrong'] else str(len(facts['wrong'])) + ' things were wrong'}.**",
        *(f"- {wrong}" for wrong in facts["wrong"]),
        "",
        "| what | number |",
        "|---|---|",
        *(f"| {name} | {number} |" for name, number in facts["figures"].items()),
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {name} | {number} |" for name, number in sorted(facts["faults by name"].items())),
        "",
        f"![a lane a key, a bar a run, a line a fault]({drawing})",
        "",
    ]
    return "\n".join(lines)


def picture(runs: Iterable[Run], faults: Iterable[Fault], keys: Iterable[str], started: float) -> str:
    """Draw a lane for each key, with a bar for each run, and a line for each fault, as SVG."""
    runs, keys = list(runs), list(keys)
    last = max([run.end or run.begin for run in runs] + [started + 1]) - started
    height = LANE * (len(keys) + 3)

    def x(at: float) -> float:
        return round(LEFT + (at - started) / last * (WIDTH - LEFT - 10), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, fault in enumerate(faults):
        colour = "#c0392b" if fault.cuts is not None else "#7f8c8d"
        out.append(
            f'<line x1="{x(fault.at)}" x2="{x(fault.at)}" y1="{LANE}" y2="{LANE * (len(keys) + 1)}" stroke="{colour}" '
            f'stroke-width="0.5"><title>{number}: {escape(fault.name)}</title></line>'
        )
    for lane, key in enumerate(keys, 1):
        out.append(f'<text x="8" y="{LANE * lane + 17}">key {escape(key)}</text>')
        for run in runs:
            if run.key != key:
                continue
            end = run.end if run.end is not None else run.begin
            kind = (
                "told of a loss"
                if run.lost
                else "killed"
                if run.killed
                else "completed"
                if run.completed
                else "neither"
            )
            out.append(
                f'<rect x="{x(run.begin)}" y="{LANE * lane + 5}" width="{max(0.4, round(x(end) - x(run.begin), 1))}" '
                f'height="{LANE - 10}" fill="{COLOURS[kind]}"/>'
            )
    for number, (kind, colour) in enumerate(COLOURS.items()):
        left, top = LEFT + number * 170, LANE * (len(keys) + 1) + 12
        out.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{left + 18}" y="{top + 10}">{kind}</text>')
    out.append(
        f'<text x="{LEFT}" y="{LANE * (len(keys) + 2) + 16}">0 to {last:.0f} s; red lines: faults that cut sessions; '
        "grey lines: others</text></svg>"
    )
    return "\n".join(out) + "\n"
