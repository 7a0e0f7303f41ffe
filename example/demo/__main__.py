"""Sell the same stock through every door at once, and see which doors lose updates.

Starts what it needs, prints a line for each step and then the table. The exit status is 0 when
every unguarded door lost updates and no guarded door did; else it is 1, after a line for each
promise that a door broke.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from example.demo import ending
from example.demo.clients import Load
from example.demo.processes import DemoError
from example.demo.report import LEGEND, say, step, table, write_json
from example.demo.shop import Shop, open_shop
from example.demo.verdict import broken_promises

if TYPE_CHECKING:
    from collections.abc import Sequence

    from example.demo.verdict import Row

FULL = Load(requests=120, stock=96, clients=16, scripts=4)
SHORT = Load(requests=32, stock=24, clients=16, scripts=4)
#: Seconds that all doors together may take.
LIMIT = 58


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = _parser().parse_args(arguments)
    ending.arrange()
    try:
        with ExitStack() as stack:
            try:
                return _run(options, stack)
            finally:
                ending.ignore_signals()
                step("stopping")
    except DemoError as error:
        say(f"the demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m example.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--short", action="store_true", help="fewer requests, under 20 seconds")
    parser.add_argument("--serve", action="store_true", help="keep the servers until Ctrl-C")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON, too")
    return parser


def _run(options: argparse.Namespace, stack: ExitStack) -> int:
    shop = open_shop(stack)
    rows = _try_doors(shop, SHORT if options.short else FULL)
    broken = broken_promises(rows)
    if options.json:
        write_json(options.json, rows, broken)
    say(f"\n{table(rows)}\n\n{LEGEND}\n")
    for sentence in broken:
        say(f"broken: {sentence}")
    if not broken:
        say("every unguarded door lost updates; no guarded door did")
    if options.serve:
        _serve(shop)
    return 1 if broken else 0


def _try_doors(shop: Shop, load: Load) -> list[Row]:
    # Django is set up by now, and not before: the addresses of the servers were not known.
    from example.demo.doors import doors, try_door  # noqa: PLC0415

    rows = []
    with ending.time_limit(LIMIT):
        for door in doors(shop.port):
            row = try_door(door, load)
            rows.append(row)
            step(f"{door.name}: {row.sold} sold, {row.lost} lost, in {row.seconds:.1f} s")
    return rows


def _serve(shop: Shop) -> None:
    from example.demo.doors import fill_shelf  # noqa: PLC0415

    fill_shelf("play", 100)
    say(shop.directions())
    try:
        signal.pause()
    except KeyboardInterrupt:
        say()


if __name__ == "__main__":
    sys.exit(main())
