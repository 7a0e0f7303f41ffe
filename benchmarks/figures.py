"""What is done with measured times: medians and percentiles, tables for people, and pictures."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contestants import BLOCKING, LIBRARIES, OURS, YARDSTICK


class Spread(NamedTuple):
    """A median, and what 95 and 99 of 100 do not exceed."""

    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up `values`, at least two."""
        cuts = statistics.quantiles(values, n=100)
        return cls(cuts[49], cuts[94], cuts[98])

    def __str__(self) -> str:
        """Give three cells of a table."""
        return " | ".join(f"{value:.0f}" for value in self)


def parser(documentation: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Make the command line of a benchmark: `--docs`, and a whole number for each of `defaults`."""
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--docs", type=_folder, metavar="FOLDER", help="where to write the table and the picture, too")
    for name, value in defaults.items():
        made.add_argument(f"--{name}", type=int, default=value)
    return made


def _folder(text: str) -> Path:
    """Make the folder now: after the measurement, a missing one would cost its results."""
    folder = Path(text)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(head: str, rows: Iterable[str]) -> list[str]:
    """Give a table in Markdown: its head and rows are cells, separated by ` | `."""
    return [f"| {head} |", "|" + "---|" * (head.count(" | ") + 1), *(f"| {row} |" for row in rows), ""]


def not_installed(names: Sequence[str]) -> list[str]:
    """Name those that could not be had, if any."""
    return [f"Not installed, so not measured: {', '.join(names)}.", ""] if names else []


def publish(
    name: str, title: str, lines: Sequence[str], docs: Path | None, picture: str = "", versions: Sequence[str] = ()
) -> None:
    """Print `lines`; with `docs`, write them there as a page, with the machine and what the picture shows.

    `versions`: of the servers and libraries that were measured.
    """
    print("\n".join(lines), flush=True)
    if docs is not None:
        shown = [f"![{picture}]({name}.png)", ""] if picture and (docs / f"{name}.png").exists() else []
        page = [f"# {title}", "", f"`python -m benchmarks.{name}`, on {machine(versions)}.", "", *shown, *lines]
        (docs / f"{name}.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


def machine(versions: Sequence[str] = ()) -> str:
    """Describe where it was measured, and what."""
    python = f"CPython {platform.python_version()}"
    return ", ".join([f"{os.cpu_count()} processors{_model()}", python, *versions, f"commit {_commit()}"])


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f" ({', '.join(sorted(names))})" if names else ""


def _commit() -> str:
    """Name the commit, and say whether more has changed since than pages such as the one that we write."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs")
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def color(name: str) -> str:
    """Give ours one color in all pictures, the yardsticks another one."""
    return {OURS: "tab:orange", YARDSTICK: "black", BLOCKING: "black"}.get(name, "tab:gray")


def pyplot() -> Any:
    """Give matplotlib's pyplot, which `make bench` has; None: it is not there."""
    sys.path.append(str(LIBRARIES.absolute()))
    try:
        import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]  # not among the development tools
    except ImportError:
        print("(no picture: matplotlib is not installed)")
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    return plt


def draw_bars(path: Path, what: str, bars: Mapping[str, float], ours: Sequence[str] = (OURS,)) -> None:
    """Draw a bar for each name; 1 is a line."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(bars) + 1))
    names = list(bars)[::-1]
    drawn = axes.barh(
        names, [bars[name] for name in names], color=["tab:orange" if n in ours else "tab:gray" for n in names]
    )
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(what)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_lines(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], across: str, upwards: str) -> None:
    """Draw, a panel each, a line for each name, on logarithmic scales."""
    plt = pyplot()
    if plt is None:
        return
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), sharey=True, squeeze=False)
    for axes, (title, lines) in zip(all_axes[0], panels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            known = name in (OURS, YARDSTICK, BLOCKING)
            axes.plot(
                list(points),
                list(points.values()),
                marker="o",
                label=name,
                color=color(name) if known else f"C{number % 10}",
                linewidth=2.5 if known else 1,
                alpha=1 if known else 0.6,
            )
        axes.set(title=title, xlabel=across, xscale="log", yscale="log")
        ticks = sorted({point for points in lines.values() for point in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    all_axes[0][0].set_ylabel(upwards)
    all_axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
