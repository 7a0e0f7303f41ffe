"""How long `import concurrency_safe` takes, beside `import psycopg`, which it imports.

    python -m benchmarks.imports [--rounds 30] [--docs FOLDER]

Each import is in an interpreter of its own, one kind after the other; the interpreter's own start is not a part of it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks import figures

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
    options = figures.parser(__doc__, rounds=30).parse_args()
    modules = ("psycopg", "concurrency_safe")
    rounds = [[milliseconds(module) for module in modules] for _ in range(options.rounds + 1)][1:]
    rows = []
    for number, module in enumerate(modules):
        median = statistics.median(each[number] for each in rounds)
        ratio = statistics.median(each[number] / each[0] for each in rounds)
        rows.append(f"{module} | {median:.0f} | {ratio:.2f}")
    figures.publish("imports", "Import", figures.table("import | ms | of psycopg's", rows), options.docs)


if __name__ == "__main__":
    main()
