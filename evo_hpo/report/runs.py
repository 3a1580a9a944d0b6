"""What analysis knows of one problem and of one search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evo_hpo.search.loop import Checkpoint, SearchResult
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import CompressionSpace

__all__ = ["AXES", "ProblemInfo", "SearchRun"]

AXES = {
    "tokens": "calibration tokens spent",
    "evaluations": "trials scored",
    "seconds": "seconds of scoring",
}
"""What an anytime curve may be drawn against, and how the axis is labelled."""


@dataclass(frozen=True)
class ProblemInfo:
    """A problem as recorded beside its searches.

    Attributes:
        key: its name in the comparison.
        space: what was searched.
        fingerprint: what made the searches comparable (model, data, space).
        reference: held-out figures of the uncompressed model; empty where there is none.
        optimum: least loss of any feasible assignment, where known.
        describe: of the space, a few lines; ``notes``: what else the reader should know.
    """

    key: str
    space: CompressionSpace
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    optimum: float | None = None
    describe: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, key: str, data: Mapping[str, Any]) -> ProblemInfo:
        """The problem as ``comparison.json`` describes it."""
        return cls(
            key,
            CompressionSpace.from_json(data["space"]),
            data.get("fingerprint") or {},
            data.get("reference") or {},
            data.get("optimum"),
            data.get("describe") or "",
            tuple(map(str, data.get("notes") or ())),
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """What to say above its results: the space without its groups, and the notes."""
        space = [line.strip() for line in self.describe.splitlines() if not line.strip().startswith("group ")]
        return (*space, *self.notes)

    @property
    def is_language_model(self) -> bool:
        """True when the held-out loss is a KL divergence beside a perplexity."""
        return "perplexity" in self.reference

    @property
    def loss_name(self) -> str:
        """Name and unit of the held-out loss; lower is better."""
        return "held-out KL (nats/token)" if self.is_language_model else "held-out loss"

    @property
    def average_name(self) -> str:
        """What the first resource's average over weights is called."""
        resource = self.space.resources[0]
        if resource == "modules" and all(unit.size == 1 for unit in self.space.units):
            return "modules kept, share"
        return "weights kept, share" if resource == "weights" else f"{resource} a weight"


@dataclass(frozen=True)
class SearchRun:
    """One search: its trials, its held-out checkpoints, its time.

    Attributes:
        id: its name in the comparison, unique.
        problem: key of the problem.
        searcher: registered name; ``label``: shown name, which tells variants apart.
        seed: of searcher and minibatches.
        outcomes: every trial scored so far, in order.
        checkpoints: held-out figures along the budget, in order.
        seconds: wall-clock of the whole loop; ``searcher_seconds``: of it inside ask and tell. NaN until known.
        finished: the search ended by itself.
        stop_reason: why.
        deterministic: the searcher ignores its seed, so this run stands for every seed.
        budget: kind and amount, where recorded, for example ``{"tokens": 65536}``.
        scoring: what the problem said about how it scored.
    """

    id: str
    problem: str
    searcher: str
    label: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    seconds: float = math.nan
    searcher_seconds: float = math.nan
    finished: bool = True
    stop_reason: str = ""
    deterministic: bool = False
    budget: Mapping[str, float] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_result(cls, result: SearchResult, **identity: Any) -> SearchRun:
        """A search that was run in this process; ``identity`` gives the remaining fields."""
        budget = {} if result.ledger is None else {result.ledger.budget.kind: result.ledger.budget.amount}
        return cls(
            outcomes=tuple(result.outcomes),
            checkpoints=tuple(result.checkpoints),
            seconds=result.seconds,
            searcher_seconds=result.searcher_seconds,
            stop_reason=result.stop_reason,
            budget=budget,
            scoring=result.scoring,
            **identity,
        )

    @cached_property
    def tokens(self) -> int:
        """Calibration tokens charged."""
        return sum(o.tokens for o in self.outcomes)

    @property
    def evaluations(self) -> int:
        """Trials scored."""
        return len(self.outcomes)

    @cached_property
    def model_seconds(self) -> float:
        """Seconds that scoring took; the searcher's own time and held-out checks are not in it."""
        return sum(o.seconds for o in self.outcomes)

    @property
    def final(self) -> Checkpoint | None:
        """The last held-out checkpoint; None before the first."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def loss(self) -> float:
        """Held-out loss of the last checkpoint (lower is better); inf when there is none."""
        if self.final is None:
            return math.inf
        loss = self.final.held_out.get("loss", math.inf)
        return math.inf if math.isnan(loss) else float(loss)

    def spent(self, axis: str) -> float:
        """Tokens, evaluations or seconds of scoring that the search spent."""
        return float({"tokens": self.tokens, "evaluations": self.evaluations, "seconds": self.model_seconds}[axis])

    @property
    def progress(self) -> float:
        """Share of the budget spent, 0 to 1; 1 when finished; NaN when the budget is not recorded."""
        if self.finished:
            return 1.0
        shares = [self.spent(kind) / amount for kind, amount in self.budget.items() if kind in AXES and amount > 0]
        return min(1.0, shares[0]) if shares else math.nan
