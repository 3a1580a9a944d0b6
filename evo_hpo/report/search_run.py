"""What the report knows of one search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evo_hpo.record.comparison import PlannedSearch
from evo_hpo.record.records import SearchRecord
from evo_hpo.search.budget import KINDS
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.sensitivities import READS
from evo_hpo.search.trial import Measured, Outcome


@dataclass(frozen=True)
class SearchRun:
    """One search: its trials, its held-out checkpoints, its time.

    Attributes:
        id: its name in the comparison, unique.
        problem: key of the problem.
        searcher: registered name; ``label``: shown name, which tells variants apart.
        seed: of searcher and minibatches.
        outcomes: every trial scored so far, in order.
        probes: sensitivities measured so far, each with the number of outcomes before it.
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
    outcomes: tuple[Outcome, ...] = ()
    probes: tuple[tuple[int, Measured], ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    seconds: float = math.nan
    searcher_seconds: float = math.nan
    finished: bool = True
    stop_reason: str = ""
    deterministic: bool = False
    budget: Mapping[str, float] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, planned: PlannedSearch, record: SearchRecord) -> SearchRun:
        """A search as its comparison planned it and its journal tells it."""
        end = record.end or {}
        return cls(
            id=planned.id,
            problem=planned.problem,
            searcher=planned.searcher,
            label=planned.label,
            seed=planned.seed,
            outcomes=tuple(record.outcomes),
            probes=tuple(record.probes),
            checkpoints=tuple(record.checkpoints),
            seconds=float(end.get("seconds", math.nan)),
            searcher_seconds=float(end.get("searcher_seconds", math.nan)),
            finished=record.finished,
            stop_reason=str(end.get("stop_reason", "")),
            deterministic=planned.deterministic,
            budget=dict(record.header.get("budget") or {}),
            scoring=dict(end.get("scoring") or {}),
        )

    @cached_property
    def tokens(self) -> int:
        """Calibration tokens charged."""
        return sum(o.tokens for o in self.outcomes) + sum(m.sensitivities.tokens for _, m in self.probes)

    def tokens_so_far(self) -> list[int]:
        """Tokens charged when each outcome was told, sensitivities before it included."""
        spent, charged = 0, []
        for number, outcome in enumerate(self.outcomes):
            spent += outcome.tokens + sum(m.sensitivities.tokens for before, m in self.probes if before == number)
            charged.append(spent)
        return charged

    @property
    def evaluations(self) -> int:
        """Trials scored, sensitivities counted as three."""
        return len(self.outcomes) + READS * len(self.probes)

    @cached_property
    def model_seconds(self) -> float:
        """Seconds that scoring took; the searcher's own time and held-out checks are not in it."""
        return sum(o.seconds for o in self.outcomes) + sum(m.seconds for _, m in self.probes)

    @property
    def final(self) -> Checkpoint | None:
        """The last held-out checkpoint; None before the first."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def loss(self) -> float:
        """Held-out loss of the last checkpoint (lower is better); inf when there is none."""
        return self.final.loss if self.final else math.inf

    def spent(self, axis: str) -> float:
        """Tokens, evaluations or seconds of scoring that the search spent."""
        return float({"tokens": self.tokens, "evaluations": self.evaluations, "seconds": self.model_seconds}[axis])

    @property
    def progress(self) -> float:
        """Share of the budget spent, 0 to 1; 1 when finished; NaN when the budget is not recorded."""
        if self.finished:
            return 1.0
        shares = [self.spent(kind) / amount for kind, amount in self.budget.items() if kind in KINDS and amount > 0]
        return min(1.0, shares[0]) if shares else math.nan
