"""One demo-like comparison and one suite-like comparison, run once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from evo_hpo import Budget, FunctionProblem
from tests.report.synthetic import StandIn, known_optimum, model_space, write_folder

EVOPRESS = {"offspring": 6, "survivors": (2, 1), "tokens": (16, 64)}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three searchers, two seeds, a token budget, one problem with a dense model."""
    searchers = [("uniform", "uniform", {}), ("random", "random", {}), ("evopress", "evopress", EVOPRESS)]
    folder = tmp_path_factory.mktemp("demo")
    return write_folder(folder, [StandIn(model_space(4))], searchers, (0, 1), Budget(tokens=64 * 60))


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two problems (one with a known optimum), two variants of one searcher, six seeds."""
    searchers = [
        ("uniform", "uniform", {}),
        ("random", "random", {}),
        ("evopress", "evopress", {"offspring": 4}),
        ("evopress", "evopress", {"offspring": 16}),
    ]
    blocks = model_space(2)
    problems = [known_optimum(8), FunctionProblem(blocks, StandIn(blocks).exact, "blocks")]
    return write_folder(tmp_path_factory.mktemp("suite"), problems, searchers, range(6), Budget(evaluations=40))
