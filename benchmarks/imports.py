"""How long `import concurrency_safe` takes, beside `import psycopg`, which it imports.

    python -m benchmarks.imports [--rounds 30] [--markdown FILE]

Each import is in an interpreter of its own, one kind after the other; the interpreter's own start is not a part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

_TIMED = """
import sys, time
started = time.perf_counter()
import {module}
print(time.perf_counter() - started, "django" in sys.modules)
"""


def milliseconds(module: str) -> float:
    """Import `module` in a new interpreter; Django must not come with it."""
    command = [sys.executable, "-c", _TIMED.format(module=module)]
    # The first import of all writes the bytecode, as an installation does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, django = done.stdout.split()
    if django == "True":
        raise SystemExit(f"import {module} imports Django")
    return float(seconds) * 1000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    modules = ("psycopg", "concurrency_safe")
    rounds = [[milliseconds(module) for module in modules] for _ in range(options.rounds + 1)][1:]
    lines = ["| import | ms | of psycopg's |", "|---|---|---|"]
    for number, module in enumerate(modules):
        median = statistics.median(each[number] for each in rounds)
        ratio = statistics.median(each[number] / each[0] for each in rounds)
        lines.append(f"| {module} | {median:.0f} | {ratio:.2f} |")
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
