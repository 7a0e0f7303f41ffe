"""Write constraints.txt: one exact version of every package that the project or its tools need.

    python .ci/pin.py [--upgrade] PYTHON...

PYTHON: an interpreter of each supported minor version (python3.10 python3.11 ...); pip resolves
for each of them without installing, and where their answers differ the lines carry a marker.
Pins that exist are kept, `--upgrade` forgets them first. No index address gets into the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
PROJECT = "django-concurrency-safe"
HEADER = """\
# Exact versions of all that the project and its tools need, for every supported Python.
# Written by .ci/pin.py; CONTRIBUTING.md says how. Used as: pip install -c constraints.txt ...
"""


def python_version(python: str) -> tuple[int, int]:
    """Ask an interpreter for its minor version."""
    code = "import sys; print(*sys.version_info[:2])"
    answer = subprocess.check_output([python, "-c", code], text=True)
    major, minor = answer.split()
    return int(major), int(minor)


def resolve(python: str, *, upgrade: bool) -> dict[str, str]:
    """Ask pip which versions it would install for `python`: {normalized name: version}."""
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", f"{ROOT}[dev]"]
    if TARGET.exists() and not upgrade:
        command += ["--constraint", str(TARGET)]
    # From anywhere else than the checkout: its folders would shadow modules of the same names.
    report = json.loads(subprocess.check_output(command, cwd="/"))
    found = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    return {normalize(name): version for name, version in found if normalize(name) != PROJECT}


def normalize(name: str) -> str:
    """Spell a package's name as all indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str, resolved: dict[tuple[int, int], dict[str, str]]) -> list[str]:
    """Give the lines for one package; the outermost answers also hold for Pythons beyond."""
    answers = [(python, found[name]) for python, found in sorted(resolved.items()) if name in found]
    runs = [list(run) for _, run in groupby(answers, key=lambda answer: answer[1])]
    if len(runs) == 1:
        return [f"{name}=={runs[0][0][1]}"]
    lines = []
    for place, run in enumerate(runs):
        bounds = []
        if place > 0:
            bounds.append("python_version >= '{}.{}'".format(*run[0][0]))
        if place < len(runs) - 1:
            bounds.append("python_version < '{}.{}'".format(*runs[place + 1][0][0]))
        lines.append(f"{name}=={run[0][1]}; {' and '.join(bounds)}")
    return lines


def main() -> None:
    """Resolve for each interpreter named on the command line, and write the file."""
    parser = argparse.ArgumentParser(description="Write constraints.txt.")
    parser.add_argument("--upgrade", action="store_true", help="forget the pins that exist")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    options = parser.parse_args()

    resolved = {}
    for python in options.pythons:
        version = python_version(python)
        print("resolving for Python {}.{}".format(*version), file=sys.stderr)
        resolved[version] = resolve(python, upgrade=options.upgrade)

    names = sorted({name for found in resolved.values() for name in found})
    lines = [line for name in names for line in pins(name, resolved)]
    draft = TARGET.with_suffix(".new")
    draft.write_text(HEADER + "\n".join(lines) + "\n")
    draft.replace(TARGET)


if __name__ == "__main__":
    main()
