"""The house: which way imports go, what is installed, and the rules that imports can show."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("evo_hpo", "searchers", "benchmarks")
FILES = sorted(p for package in OURS for p in (ROOT / package).rglob("*.py"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]

FLOORS = (
    {"evo_hpo/errors.py", "evo_hpo/files.py"},
    {"evo_hpo/space"},
    {"evo_hpo/search", "evo_hpo/models"},
    {"evo_hpo/__init__.py", "evo_hpo/record", "evo_hpo/levels", "searchers"},
    {"evo_hpo/scoring", "evo_hpo/report", "evo_hpo/tracking"},
    {"evo_hpo/run", "evo_hpo/export", "benchmarks/problems"},
    {"evo_hpo/cli"},
    {"benchmarks/measurements"},
)
"""Rooms from the ground up, as in CONTRIBUTING.md; an import between two rooms goes to a lower floor."""

HEAVY = {"models", "levels", "scoring", "export"}
"""Rooms of evo_hpo that may import torch, transformers and safetensors."""

THROUGH = {"accelerate", "cmaes"}
"""Required packages that another required one uses for us: transformers, Optuna."""

LONGEST = 350
"""Lines of a file of the product."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> Sequence[str]:
    """Every module that a file imports, anywhere in it; names of a package as if they were its modules."""
    found: list[str] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


def top(name: str) -> str:
    """First part of a dotted name."""
    return name.partition(".")[0]


def place(path: Path) -> str:
    """A file relative to the repository."""
    return path.relative_to(ROOT).as_posix()


@cache
def graph() -> dict[str, set[str]]:
    """File of ours -> the files of ours that it imports."""
    modules = {place(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): place(p) for p in FILES}

    def file_of(name: str) -> str | None:
        return modules.get(name) or modules.get(name.rpartition(".")[0])

    return {place(p): {f for name in imported(p) if (f := file_of(name)) and f != place(p)} for p in FILES}


def folders(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders; a file that lies loose in evo_hpo counts as one."""

    def folder(file: str) -> str:
        return file if file.count("/") == 1 and file.startswith("evo_hpo/") else file.rpartition("/")[0]

    found: dict[str, set[str]] = {}
    for file, others in files.items():
        found.setdefault(folder(file), set()).update(folder(o) for o in others if folder(o) != folder(file))
    return found


def room(file: str) -> str | None:
    """The room that a file lies in; None for an empty package above rooms."""
    return next((r for floor in FLOORS for r in floor if file == r or file.startswith(f"{r}/")), None)


@pytest.mark.parametrize("draw", [graph, lambda: folders(graph())], ids=["files", "folders"])
def test_imports_make_no_circle(draw: Any) -> None:
    try:
        TopologicalSorter(draw()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_imports_between_rooms_go_to_a_lower_floor() -> None:
    floor = {r: height for height, rooms in enumerate(FLOORS) for r in rooms}
    arrows = {(room(file), room(other)) for file, others in graph().items() for other in others}
    up = {(a, b) for a, b in arrows if a != b and a and b and floor[a] <= floor[b]}
    assert not up
    assert len(FLOORS) <= 8
    alone = {place(p) for p in FILES if room(place(p)) is None}
    assert alone == {"benchmarks/__init__.py"}
    assert not graph()["benchmarks/__init__.py"]


def test_contributing_names_every_room_on_its_floor() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d) \| `([^`]+)` \| [^|]+ \|$", text, re.MULTILINE)
    named = [{r.removesuffix("/") for n, r in lines if int(n) == height} for height in range(1, len(FLOORS) + 1)]
    assert named == list(FLOORS)
    rooms = {place(p.parent) for p in FILES if p.name == "__init__.py" and place(p).startswith("evo_hpo/")}
    assert rooms - {"evo_hpo"} <= {r for floor in FLOORS for r in floor}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_go_from_benchmarks_to_searchers_to_the_framework(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    names = {top(n) for n in imported(path)}
    if parts[0] == "evo_hpo":
        assert not names & {"searchers", "benchmarks"}
    if parts[0] == "searchers":
        assert "benchmarks" not in names
    assert "tests" not in names


@pytest.mark.parametrize("path", FILES, ids=place)
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    names = {top(n) for n in imported(path)}
    if parts[0] == "benchmarks":
        return
    if parts[0] != "evo_hpo" or parts[1] not in HEAVY:
        assert not names & {"torch", "transformers", "safetensors"}
    if parts[:2] != ("evo_hpo", "tracking"):
        assert "mlflow" not in names
    if parts[0] == "evo_hpo":
        assert not names & {"optuna", "nevergrad"}


def test_no_file_of_the_product_is_long() -> None:
    lengths = {place(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert not {file: n for file, n in lengths.items() if n > LONGEST}


# ---------------------------------------------------------------------- packages


def names_of(requirements: list[str]) -> set[str]:
    """Names of the packages in a list of requirements, as registries spell them."""
    return {re.split(r"[<>=\[ ]", r)[0].lower().replace("_", "-") for r in requirements}


@cache
def packages(path: Path) -> set[str]:
    """Packages of others that a file imports."""
    others = {top(n) for n in imported(path)} - {*OURS, "tests"} - sys.stdlib_module_names
    return {(n if n in KNOWN.get(n, [n]) else KNOWN[n][0]).lower().replace("_", "-") for n in others}


KNOWN = packages_distributions()
REQUIRED = names_of(PROJECT["dependencies"])
EXTRAS = {name: names_of(needed) for name, needed in PROJECT["optional-dependencies"].items()}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_imports_what_is_required_or_in_an_extra_that_it_names(path: Path) -> None:
    named = re.findall(r"extra `([\w-]+)`", ast.get_docstring(parsed(path)) or "")
    assert packages(path) <= REQUIRED.union(*(EXTRAS[name] for name in named))


def test_tests_import_what_is_required_or_in_the_extras_that_they_are_run_with() -> None:
    found = {p for path in (ROOT / "tests").rglob("*.py") for p in packages(path)}
    used = re.findall(r'--editable "\.\[([\w,-]+)\]"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert found <= REQUIRED.union(*(EXTRAS[name] for name in used[0].split(",")))


def test_what_is_required_is_imported_by_what_is_installed() -> None:
    installed = [p for p in FILES if "measurements" not in p.parts]
    assert {p for path in installed for p in packages(path)} - set().union(*EXTRAS.values()) == REQUIRED - THROUGH
    assert {"optuna", "nevergrad", "torch", "transformers", "datasets", "mlflow"} <= REQUIRED


def test_what_is_required_is_pinned() -> None:
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line]
    assert len(pinned) == len(names_of(pinned))
    assert REQUIRED.union(*EXTRAS.values()) <= names_of(pinned)


def test_the_wheel_carries_what_a_plan_can_name_and_no_measurement() -> None:
    wanted = SETUPTOOLS["packages"]["find"]["include"]
    on_disk = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in FILES if p.name == "__init__.py"}
    carried = {name for name in on_disk if any(fnmatch(name, pattern) for pattern in wanted)}
    assert carried == {n for n in on_disk if not n.startswith("benchmarks.")} | {"benchmarks.problems"}
    modules = {target.partition(":")[0] for group in PROJECT["entry-points"].values() for target in group.values()}
    assert {m.rpartition(".")[0] for m in modules} <= carried
    data = SETUPTOOLS["package-data"].items()
    listed = {p for package, patterns in data for pattern in patterns for p in (ROOT / package).glob(pattern)}
    folders_carried = [*(ROOT / name.replace(".", "/") for name in carried), ROOT / "benchmarks/plans"]
    found = {p for folder in folders_carried for p in folder.iterdir() if p.is_file()}
    assert {p for p in found if p.suffix not in (".py", ".pyc")} <= listed


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_uses_global_random_state(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "random" not in {n for n in imported(path) if n == "random"}
    for call in ("np.random.seed", "np.random.rand", "torch.manual_seed", "torch.rand(", "torch.randn("):
        for line in text.splitlines():
            if call in line and "generator" not in line:
                pytest.fail(f"{path.name}: {line.strip()}")


def test_the_public_names_are_these() -> None:
    import evo_hpo
    import searchers

    assert evo_hpo.__all__ == [
        "Allowance",
        "Assignment",
        "Batch",
        "Budget",
        "Checkpoint",
        "CompressionSpace",
        "FunctionProblem",
        "Ledger",
        "Minibatch",
        "Outcome",
        "Probe",
        "Problem",
        "Score",
        "SearchResult",
        "Searcher",
        "Sensitivities",
        "Terms",
        "Trial",
        "Unit",
        "search",
    ]
    assert searchers.__all__ == ["available_searchers", "make_searcher"]
