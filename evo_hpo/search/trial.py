"""What a searcher asks for and what comes back. Both are values: frozen, never changed after they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from evo_hpo.space.compression_space import Assignment

__all__ = ["Draw", "Outcome", "Status", "Trial"]

Draw = Literal["fresh", "same", "fixed"]
"""Which minibatch a batch is scored on: a fresh one; the one before (with more tokens: a superset of it, nested);
or the search's one fixed minibatch, on which all trials of the search are comparable."""

Status = Literal["complete", "stopped", "failed"]
"""``stopped``: the loss is only a lower bound, enough to know that others are better. ``failed``: no loss at all."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One assignment that a searcher wants scored.

    Attributes:
        number: the searcher's count of trials, from 0.
        levels: the assignment; must be feasible.
        tokens: calibration tokens to score it on; None: the problem's default.
        generation, stage: where in the search it was asked (0 where a searcher has none).
        parent: number of the trial it was made from.
        minibatch: see :data:`Draw`; all trials of one batch agree in it and in ``tokens``.
        keep: only the best ``keep`` of the batch matter, the others may be stopped early; None: all matter.
        note: the searcher's own remark, kept in the journal.
    """

    number: int
    levels: Assignment
    tokens: int | None = None
    generation: int = 0
    stage: int = 0
    parent: int | None = None
    minibatch: Draw = "fixed"
    keep: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What scoring a trial gave.

    Attributes:
        trial: the trial.
        loss: lower is better; ``inf`` when failed.
        tokens: calibration tokens charged.
        seconds: the trial's share of the batch's scoring time.
        minibatch: seed of the minibatch it was scored on.
        status: see :data:`Status`.
        reason: why it failed.
    """

    trial: Trial
    loss: float
    tokens: int = 0
    seconds: float = 0.0
    minibatch: int = 0
    status: Status = "complete"
    reason: str = ""

    @property
    def usable(self) -> bool:
        """True when the loss is exact and finite."""
        return self.status == "complete" and math.isfinite(self.loss)
