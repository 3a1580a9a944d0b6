"""What a search had found at one moment: its incumbent, and over a range of budgets its front."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.ranges import marks


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One assignment of a front.

    Attributes:
        levels: the assignment.
        cost: of the first resource, exact.
        loss: least calibration loss that it got (lower is better); inf where it was not scored.
        held_out: figures from ``Problem.validate``; empty where none were taken.
    """

    levels: Assignment
    cost: int
    loss: float
    held_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Held-out figures of the incumbent at one moment of a search.

    Attributes:
        fraction: of the budget, 0 to 1, at which it was due; 1 is the final one.
        tokens, evaluations, seconds: spent when it was taken (seconds: scoring only).
        levels: the incumbent.
        held_out: figures from ``Problem.validate``; ``loss`` is lower-is-better.
        front: over a range of budgets, the points that the search would give, ascending in cost.
    """

    fraction: float
    tokens: int
    evaluations: int
    seconds: float
    levels: Assignment
    held_out: dict[str, float]
    front: tuple[FrontPoint, ...] = ()

    @property
    def loss(self) -> float:
        """Held-out loss (lower is better); inf when there is none."""
        loss = self.held_out.get("loss", math.inf)
        return math.inf if math.isnan(loss) else float(loss)


def not_dominated(space: CompressionSpace, outcomes: Iterable[Outcome]) -> list[Assignment]:
    """The assignments that lose less than all cheaper ones, of the complete trials on the most tokens."""
    usable = [o for o in outcomes if o.usable]
    most = max((o.tokens for o in usable), default=0)
    least: dict[Assignment, float] = {}
    for outcome in usable:
        if outcome.tokens == most:
            levels = outcome.trial.levels
            least[levels] = min(outcome.loss, least.get(levels, math.inf))
    return front_of(space, least)


def front_of(space: CompressionSpace, losses: Mapping[Assignment, float]) -> list[Assignment]:
    """Of assignments and their losses, those that lose less than every cheaper one, ascending in cost."""
    found, best = list[Assignment](), math.inf
    for levels in sorted(losses, key=lambda a: (space.cost(a), losses[a])):
        if losses[levels] < best:
            best = losses[levels]
            found.append(levels)
    return found


def thinned(space: CompressionSpace, front: Iterable[Assignment]) -> list[Assignment]:
    """Of a front, the dearest assignment within each mark of the range: what a reader of the range would take."""
    ordered: Sequence[Assignment] = sorted(dict.fromkeys(front), key=space.cost)
    costs = [space.cost(levels) for levels in ordered]
    taken = (bisect.bisect_right(costs, mark) for mark in marks(space))
    return list(dict.fromkeys(ordered[count - 1] for count in taken if count))


def losses_by_text(figures: Mapping[str, float]) -> dict[str, float]:
    """Held-out losses among a problem's figures: ``loss``, the first text's, under "", ``TEXT/loss`` under TEXT."""
    split = ((*key.rpartition("/")[::2], value) for key, value in figures.items())
    return {text: value for text, figure, value in split if figure == "loss"}
