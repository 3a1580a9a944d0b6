"""What happens while a comparison runs, as values: small, frozen, and sent from process to process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evo_hpo.record.problem_record import ProblemRecord


@dataclass(frozen=True, slots=True)
class ProblemLoading:
    """A process begins to make a problem, which may take a while; ``problem`` is its key."""

    problem: str


@dataclass(frozen=True, slots=True)
class ProblemMade:
    """A process made a problem; each process makes its own."""

    problem: ProblemRecord


@dataclass(frozen=True, slots=True)
class ScorersUp:
    """A cluster's scorers are there; ``count`` of them."""

    count: int


@dataclass(frozen=True, slots=True)
class SearchStarted:
    """A search begins, or goes on from its journal; ``search`` is its id, here and below."""

    search: str


@dataclass(frozen=True, slots=True)
class BatchScored:
    """A batch was scored and told.

    Attributes:
        spent: of the budget so far, in its own unit; ``trials``: scored so far.
        loss: least usable loss of the batch (lower is better); None without any.
        failed: failed trials of the batch.
        replayed: the batch was scored before, and is told from the journal.
    """

    search: str
    spent: float
    trials: int
    loss: float | None
    failed: int
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointTaken:
    """Held-out figures of the incumbent; ``loss`` among them is lower-is-better."""

    search: str
    held_out: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """A search ended by itself, and why."""

    search: str
    reason: str


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """A search could not go on; ``trace`` is empty for errors of ours, which say all in a line.

    Without a name in ``search``, none could begin.
    """

    search: str
    message: str
    trace: str = ""


Event = (
    ProblemLoading
    | ProblemMade
    | ScorersUp
    | SearchStarted
    | BatchScored
    | CheckpointTaken
    | SearchEnded
    | SearchFailed
)

Listener = Callable[[Event], None]
"""Hears every event of a comparison, in the process that started it."""
