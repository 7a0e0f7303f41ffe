"""The package in an environment that has its declared dependencies and nothing else.

The environment is made of what is installed already, without the network: the wheel is built here,
and of the other distributions those are linked in that the wheel's metadata asks for.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

#: libpq for psycopg; a machine that has it installed needs no such wheel.
LIBPQ = "psycopg-binary"


def build_wheel(folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *options,
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=50)
    (wheel,) = folder.glob("*.whl")
    return wheel


def needed_by(requirements: list[str]) -> set[str]:
    """Give the names of all distributions that `requirements` lead to, without any extra."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        name = canonicalize_name(requirement.name)
        if applies and name not in found:
            found.add(name)
            waiting += map(Requirement, metadata.requires(name) or [])
    return found


def link_distribution(name: str, site: Path) -> None:
    files = metadata.files(name)
    assert files, f"{name} has no list of its files"
    tops = {file.parts[0] for file in files if not file.parts[0].startswith("..")}
    for top in tops - {"__pycache__"}:
        target = Path(str(metadata.distribution(name).locate_file(top)))
        (site / top).symlink_to(target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the Python of an environment with the wheel and its own requirements."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (own,) = metadata.distributions(path=[str(site)])
    for name in needed_by([*(own.requires or []), LIBPQ]):
        link_distribution(name, site)
    return home / "bin" / "python"


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    # -I: neither this checkout nor the environment's variables count.
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=30, check=False, cwd="/")


def test_the_package_imports_with_its_own_requirements_alone(bare_python: Path) -> None:
    answer = run(bare_python, "import concurrency_safe; print(concurrency_safe.__file__)")

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(bare_python.parents[1]))


def test_importing_the_package_does_not_import_django(bare_python: Path) -> None:
    answer = run(bare_python, "import concurrency_safe, sys; print('django' in sys.modules)")

    assert answer.stdout == "False\n", answer.stderr


def test_every_public_name_is_there(bare_python: Path) -> None:
    answer = run(bare_python, "from concurrency_safe import *; print(lock, concurrency_safe)")

    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(("extra", "module"), [("celery", "contrib.celery"), ("cli", "cli")])
def test_a_module_without_its_extra_says_what_to_install(bare_python: Path, extra: str, module: str) -> None:
    answer = run(bare_python, f"import concurrency_safe.{module}")

    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith(("ImportError", "ModuleNotFoundError"))
    assert f'pip install "django-concurrency-safe[{extra}]"' in answer.stderr


def test_the_cron_guard_needs_no_extra(bare_python: Path) -> None:
    answer = run(bare_python, "from concurrency_safe.contrib.cron import cron_guard; cron_guard('job')(print)")

    assert answer.returncode == 0, answer.stderr


def test_the_wheel_holds_the_package_its_types_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert "concurrency_safe/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"concurrency_safe"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
