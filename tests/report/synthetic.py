"""Comparison folders with real searches and journals on a cheap stand-in for a language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evo_hpo import Budget, CompressionSpace, Minibatch, Problem, Score, Unit, search
from evo_hpo.record.comparison import Comparison, PlannedSearch
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.findings import Findings
from evo_hpo.report.search_run import SearchRun
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment
from searchers import make_searcher

ROLES = {f"self_attn.{n}_proj": size for n, size in zip("qkvo", (9, 3, 3, 9), strict=True)} | {
    f"mlp.{n}_proj": 24 for n in ("gate", "up", "down")
}
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def model_space(blocks: int = 6, labels: Sequence[str] = ("2", "3", "4")) -> CompressionSpace:
    """Blocks x roles with three levels, at 3 bits a weight."""
    units = [
        Unit(
            f"model.layers.{b}.{role}",
            tuple(size * k for k in range(2, 2 + len(labels))),
            levels=tuple(labels),
            size=size,
        )
        for b in range(blocks)
        for role, size in ROLES.items()
    ]
    return CompressionSpace.from_average(units, 3, resources=("bits",))


class StandIn(Problem):
    """A loss with one sensitivity a unit, pairwise terms between neighbours, and noise that falls with tokens."""

    def __init__(self, space: CompressionSpace, name: str = "stand-in") -> None:
        self.space, self.name, self.tokens, self.pool_tokens = space, name, 64, 1 << 16
        rng = np.random.default_rng(7)
        self.weights = rng.lognormal(0, 1, len(space.units)) * [u.size for u in space.units]
        self.pairs = rng.normal(0, 0.2, len(space.units) - 1) * self.weights[1:]

    def exact(self, levels: Assignment) -> float:
        """The loss without noise."""
        hurt = np.array([4.0**-k for k in levels])
        return float((self.weights @ hurt + self.pairs @ (hurt[1:] * hurt[:-1])) / self.weights.sum())

    def score(self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None) -> list[Score]:
        """Noise is common to all assignments of a minibatch but for a small part."""
        rng = np.random.default_rng([minibatch.seed, minibatch.tokens])
        common = rng.normal(0, 0.5 / minibatch.tokens)
        own = rng.normal(0, 0.05 / minibatch.tokens, len(assignments))
        return [Score(self.exact(a) + common + n, minibatch.tokens) for a, n in zip(assignments, own, strict=True)]

    def validate(self, assignment: Assignment) -> dict[str, float]:
        """Exact loss and the perplexity of a dense model at 20."""
        loss = self.exact(assignment)
        return {"loss": loss, "perplexity": 20 * float(np.exp(loss))}

    def reference(self) -> dict[str, float]:
        """The dense model."""
        return {"loss": 0.0, "perplexity": 20.0}


def describe(problem: Problem) -> dict[str, Any]:
    """A problem as the comparison's record describes it."""
    return {
        "space": problem.space.to_json(),
        "fingerprint": problem.fingerprint(),
        "reference": problem.reference(),
        "optimum": getattr(problem, "optimum", None),
        "describe": problem.space.describe(),
    }


def write_folder(
    folder: Path,
    problems: Sequence[Problem],
    searchers: Sequence[tuple[str, str, dict[str, Any]]],
    seeds: Sequence[int],
    budget: Budget,
) -> Path:
    """Runs every search into a folder as a comparison leaves it; searchers are (name, label, settings)."""
    entries = []
    for problem in problems:
        for name, label, settings in searchers:
            for seed in seeds[:1] if name == "uniform" else seeds:
                variant = "".join(
                    f"-{k}{v}" for k, v in settings.items() if k == "offspring" and "tokens" not in settings
                )
                key = f"{problem.name}-{label}{variant}-s{seed}".replace(":", "-").replace(" ", "").replace("/", "~")
                entry: dict[str, Any] = {"id": key, "problem": problem.name, "searcher": name, "label": label}
                entry |= {"settings": settings, "seed": seed, "journal": f"journals/{key}.jsonl"}
                entries.append(entry)
                header = search_header(key, name, problem, budget, seed=seed, settings=settings, minibatch_seed=seed)
                with Journal.open(folder / entry["journal"], header) as journal:
                    searcher = make_searcher(name, problem.space, seed=seed, **settings)
                    search(searcher, problem, budget=budget, seed=seed, journal=journal, checkpoints=FRACTIONS)
    plan = {"name": folder.name, "seeds": list(seeds), "problems": [{"name": p.name} for p in problems],
            "budget": {budget.kind: budget.amount}}  # fmt: skip
    data = {
        "name": folder.name,
        "plan": plan,
        "problems": {p.name: describe(p) for p in problems},
        "searches": entries,
        "created": 1.76e9,
        "machine": {"cpus": 2},
        "versions": {"python": "3.11"},
    }
    (folder / "comparison.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "plan.toml").write_text(f'name = "{folder.name}"\n', encoding="utf-8")
    return folder


def in_memory(losses: dict[str, Sequence[float]], *, optimum: float | None = None) -> Findings:
    """A comparison whose results are given: searcher -> held-out loss of each seed."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(4)], 2)
    runs = tuple(
        SearchRun(
            f"{name}-{seed}",
            "made",
            name,
            name,
            seed,
            checkpoints=(Checkpoint(1.0, 100, 10, 1.0, (0, 0, 1, 1), {"loss": loss}),),
            deterministic=len(values) == 1,
        )
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    )
    return Findings("made", {"made": ProblemRecord("made", space, optimum=optimum)}, runs)


def known_optimum(units: int = 8) -> FunctionProblem:
    """An additive problem without blocks in its names, whose optimum is found by brute force."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1), levels=("dropped", "kept")) for i in range(units)], units // 2)
    gains = np.random.default_rng(3).random(units)

    def loss(levels: Assignment) -> float:
        return float(gains.sum() - gains @ np.array(levels))

    best = min(map(loss, space.enumerate()))
    return FunctionProblem(space, loss, "additive", optimum=best)


def one_run(
    problem: str,
    label: str,
    seed: int,
    losses: Sequence[float],
    *,
    spent: int = 100,
    finished: bool = True,
    fixed: bool = False,
    searcher: str = "",
) -> SearchRun:
    """A search with these held-out losses, evenly along its tokens; ``fixed``: its searcher draws nothing."""
    count = len(losses)
    taken = tuple(
        Checkpoint((i + 1) / count, spent * (i + 1) // count, i + 1, float(i + 1), (0, 0, 1, 1), {"loss": loss})
        for i, loss in enumerate(losses)
    )
    paid = (Outcome(Trial(0, (0, 0, 1, 1)), 1.0, tokens=spent, seconds=3.0),)
    name = f"{problem}-{label}-s{seed}"
    return SearchRun(
        name, problem, searcher or label, label, seed, paid, checkpoints=taken, finished=finished, deterministic=fixed
    )


def of_runs(runs: Sequence[SearchRun], missing: Sequence[tuple[str, str, int]] = (), **problem: Any) -> Findings:
    """A comparison of these searches; ``missing``: problem, label and seed of planned ones that have no journal."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(4)], 2)
    planned: list[tuple[Any, ...]] = [
        (r.id, r.problem, r.searcher, r.label, {}, r.seed, "", r.deterministic) for r in runs
    ]
    planned += [(f"{p}-{label}-s{seed}", p, label, label, {}, seed, "", False) for p, label, seed in missing]
    searches = tuple(PlannedSearch(*entry) for entry in planned)
    absent = {s.id: "not started" for s in searches[len(runs) :]}
    problems = {s.problem: ProblemRecord(s.problem, space, **problem) for s in searches}
    return Findings("made", problems, tuple(runs), absent, Comparison(Path(), searches=searches))
