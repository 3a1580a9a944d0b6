"""What is searched: a space and a way to score its assignments."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.space.compression_space import Assignment, CompressionSpace


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Calibration data of one batch of trials.

    The seed orders the pool; the minibatch is its first ``tokens`` tokens. So the same seed with more tokens is a
    superset (nested minibatches), and the same seed with the same tokens is the same data in any process.
    ``generated``: the uncompressed model writes them itself; only sensitivities are measured on such text.
    """

    seed: int
    tokens: int
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Loss of one assignment on one minibatch.

    Attributes:
        loss: lower is better; NaN or infinite: the assignment failed and ``reason`` says why.
        tokens: tokens that the model read for it, and that are charged; 0 where the problem has a fidelity: the whole
            minibatch is charged.
        stopped: scoring stopped early and the loss is a lower bound.
        reason: why it failed.
        by_sequence: loss of each sequence of the minibatch, in its order; their mean is the loss, and a nested
            minibatch begins with those of the smaller one. None: it was stopped, or the problem has no sequences.
    """

    loss: float
    tokens: int = 0
    stopped: bool = False
    reason: str = ""
    by_sequence: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a problem reads that is scored sequence by sequence: all that decides what its trials are charged.

    Attributes:
        pool: sequences that minibatches are drawn from; ``length``: tokens of each.
        group: sequences that are read in one pass.
        early_stopping: candidates that are provably not among the best may be stopped.
    """

    pool: int
    length: int
    group: int
    early_stopping: bool


class Problem(ABC):
    """A space, a loss (lower is better), and held-out figures that are outside every budget.

    Attributes:
        name: shown in tables and run names.
        space: the assignments that may be scored; the loop never passes an infeasible one.
        tokens: calibration tokens of a trial that names none; 0: the problem has no fidelity.
        pool_tokens: the most calibration tokens that a minibatch may hold; 0: no limit.
        optimum: the least loss that any feasible assignment has, where it is known.
        optima: over a range of budgets, cost and loss of every assignment that loses less than all cheaper ones,
            ascending, where they are known.
        notes: sentences that a reader of its results should know.
        has_sensitivities: whether :meth:`sensitivities` can be measured.
        reading: how it is scored sequence by sequence, by :meth:`read`; None: a trial is scored as a whole.
        texts: names of the held-out texts; empty: there is one, without a name. The figures of :meth:`validate` are the
            first one's; those of each other are called ``name/loss`` and so on, and ``name/gap`` is how far its loss is
            above the first's.
        counted: names in :meth:`report` of what is counted from the problem's making on, over all searches.
    """

    name: str
    space: CompressionSpace
    tokens: int = 0
    pool_tokens: int = 0
    optimum: float | None = None
    optima: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    has_sensitivities: bool = False
    reading: Reading | None = None
    texts: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()

    @abstractmethod
    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        """Scores all assignments on the same minibatch, in order.

        ``keep=s`` allows exact early stopping: only the best s of the batch have to be complete.
        """

    def read(self, assignments: Sequence[Assignment], groups: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Sums of the loss (nats) over each sequence's positions, assignments x sequences, where it has a ``reading``.

        ``groups``: numbers of sequences of the pool, in passes as :attr:`Reading.group` says. Stateless: a sum depends
        on its assignment and sequence only, so the work may be done anywhere, in any order.
        """
        raise InvalidSettingError(f"problem {self.name!r} is not scored sequence by sequence")

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Predicted cost of every level of every unit, seen from an assignment (None: the uncompressed model).

        Raises:
            InvalidSettingError: the problem has none, or not of this kind or form.
        """
        raise InvalidSettingError(f"problem {self.name!r} has no sensitivities: take a searcher that asks for none")

    def validate(self, assignment: Assignment) -> dict[str, float]:
        """Held-out figures of an assignment, at least ``loss`` (lower is better); never charged to a budget."""
        return {"loss": float(self.score([assignment], Minibatch(seed=0, tokens=self.tokens))[0].loss)}

    def reference(self) -> dict[str, float]:
        """Held-out figures of the uncompressed model, where there is one."""
        return {}

    def check(self, tokens: int) -> None:  # noqa: B027 - most problems can draw any minibatch
        """Raises an EvoHpoError when a minibatch of this many tokens cannot be drawn; called before any work."""

    def report(self) -> dict[str, Any]:
        """How trials were scored: measured settings, counted failures; JSON for people, compared with nothing."""
        return {}

    def report_since(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The report, with what was counted since an earlier one."""
        return {k: v - before.get(k, 0) if k in self.counted else v for k, v in self.report().items()}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that must be equal for two searches to be comparable: space, data, model, store."""
        space = json.dumps(self.space.to_json(), sort_keys=True)
        return {"problem": self.name, "space": hashlib.sha256(space.encode()).hexdigest()[:16]}


class FunctionProblem(Problem):
    """Any function of a level vector as a problem; no language model needed.

    Args:
        space: its space.
        function: assignment -> loss, lower is better. An exception or a value that is not finite is a failed trial.
        name: shown in tables.
        optimum: the least loss that any feasible assignment has, where it is known.
    """

    def __init__(
        self,
        space: CompressionSpace,
        function: Callable[[Assignment], float],
        name: str = "function",
        *,
        optimum: float | None = None,
    ) -> None:
        self.space = space
        self.function = function
        self.name = name
        self.optimum = optimum

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        return [self._score(a) for a in assignments]

    def _score(self, assignment: Assignment) -> Score:
        try:
            return Score(float(self.function(assignment)))
        except Exception as error:  # a failing evaluation is a result, the search goes on
            return Score(float("nan"), reason=f"{type(error).__name__}: {error}")
