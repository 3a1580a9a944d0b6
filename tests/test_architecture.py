"""The direction of imports, and the rules that imports can show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("evo_hpo", "searchers", "benchmarks") for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def top(name: str) -> str:
    """First part of a dotted name."""
    return name.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_from_benchmarks_to_searchers_to_the_framework(path: Path) -> None:
    place = path.relative_to(ROOT)
    names = {top(n) for n in imported(path)}
    if place.parts[0] == "evo_hpo":
        assert not names & {"searchers", "benchmarks"}
    if place.parts[0] == "searchers":
        assert "benchmarks" not in names
    assert "tests" not in names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_in_their_folders(path: Path) -> None:
    place = path.relative_to(ROOT)
    names = {top(n) for n in imported(path)}
    if place.parts[0] == "benchmarks":
        return
    if place.parts[:2] not in (*(("evo_hpo", room) for room in ("models", "levels", "scoring", "export")),):
        assert not names & {"torch", "transformers", "safetensors"}
    if place.parts[:2] != ("evo_hpo", "tracking"):
        assert "mlflow" not in names
    if place.parts[0] == "evo_hpo":
        assert not names & {"optuna", "nevergrad"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_uses_global_random_state(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "random" not in {n for n in imported(path) if n == "random"}
    for call in ("np.random.seed", "np.random.rand", "torch.manual_seed", "torch.rand(", "torch.randn("):
        for line in text.splitlines():
            if call in line and "generator" not in line:
                pytest.fail(f"{path.name}: {line.strip()}")


def test_the_public_names_are_what_they_were() -> None:
    import evo_hpo
    import searchers

    assert evo_hpo.__all__ == [
        "Allowance",
        "Assignment",
        "Budget",
        "Checkpoint",
        "CompressionSpace",
        "FunctionProblem",
        "Ledger",
        "Minibatch",
        "Outcome",
        "Problem",
        "Score",
        "SearchResult",
        "Searcher",
        "Trial",
        "Unit",
        "search",
    ]
    assert searchers.__all__ == ["available_searchers", "make_searcher"]
