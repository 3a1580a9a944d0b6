"""What a searcher asks for and what comes back. All are values: frozen, never changed after they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.sensitivities import READS, Form, Kind, Sensitivities, check_kind
from evo_hpo.space.compression_space import Assignment

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
        parent: number of the trial it was made from.
        note: the searcher's own remark, kept in the journal.
    """

    number: int
    levels: Assignment
    parent: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """How the trials of one batch are scored, the same for all of them, and where in the search they were asked.

    Attributes:
        tokens: calibration tokens of the minibatch; None: the problem's default.
        draw: which minibatch, see :data:`Draw`.
        keep: only the best ``keep`` of the batch matter, the others may be stopped early; None: all matter.
        generation, stage: 0 where a searcher has none.
        by_sequence: the losses of the minibatch's sequences are wanted too, see :attr:`Outcome.by_sequence`.
    """

    tokens: int | None = None
    draw: Draw = "fixed"
    keep: int | None = None
    generation: int = 0
    stage: int = 0
    by_sequence: bool = False


DEFAULT = Terms()


@dataclass(frozen=True, slots=True)
class Batch:
    """Trials that are scored on one minibatch, in order.

    Raises:
        InvalidSettingError: it holds no trial, or something else than trials.
    """

    trials: tuple[Trial, ...]
    terms: Terms = DEFAULT

    def __post_init__(self) -> None:
        if not self.trials:
            raise InvalidSettingError("a batch holds at least one trial: ask returns None to end a search")
        for trial in self.trials:
            if not isinstance(trial, Trial):
                raise InvalidSettingError(f"a batch holds {trial!r}: it takes trials, made by self.trial(levels)")

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    @property
    def tokens(self) -> int | None:
        """Calibration tokens of the minibatch; None: the problem's default."""
        return self.terms.tokens

    def first(self, count: int) -> Batch:
        """The batch without what follows its first ``count`` trials."""
        return self if count >= len(self.trials) else Batch(self.trials[:count], self.terms)


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
        terms: those of its batch.
        by_sequence: loss of each sequence of the minibatch (their mean is ``loss``), in its order, so that trials on
            one minibatch compare sequence by sequence; None where the batch did not ask, the problem has no sequences,
            or the trial is not complete.
    """

    trial: Trial
    loss: float
    tokens: int = 0
    seconds: float = 0.0
    minibatch: int = 0
    status: Status = "complete"
    reason: str = ""
    terms: Terms = DEFAULT
    by_sequence: tuple[float, ...] | None = None

    @property
    def usable(self) -> bool:
        """True when the loss is exact and finite."""
        return self.status == "complete" and math.isfinite(self.loss)


@dataclass(frozen=True, slots=True)
class Probe:
    """Sensitivities that a searcher wants measured: the other thing that it may ask for.

    Attributes:
        reference: the assignment they are seen from, feasible or not; None: the uncompressed model.
        kind: see :data:`evo_hpo.search.sensitivities.Kind`.
        tokens: calibration tokens that are read, each charged :attr:`reads` times; all of the pool where it holds
            fewer; None: the problem's default.
        draw: which minibatch, see :data:`Draw`.
        form: see :data:`evo_hpo.search.sensitivities.Form`.
        generated: read text that the uncompressed model writes itself, instead of the calibration text.

    Raises:
        InvalidSettingError: an unknown kind, or one that says nothing at this reference.
    """

    reference: Assignment | None = None
    kind: Kind = "sampled"
    tokens: int | None = None
    draw: Draw = "fresh"
    form: Form = "inner"
    generated: bool = False

    def __post_init__(self) -> None:
        check_kind(self.kind, self.reference, self.form)

    @property
    def reads(self) -> int:
        """Tokens charged for each token: one more where it is written first; none where nothing is read."""
        return 0 if self.kind == "layerwise" else READS + self.generated

    def cost(self, default_tokens: int) -> list[int]:
        """Tokens that it is charged: those of :attr:`reads` trials."""
        return [default_tokens if self.tokens is None else self.tokens] * self.reads


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe gave.

    Attributes:
        probe: the probe.
        sensitivities: what was measured.
        seconds: that it took.
        minibatch: seed of the minibatch it was measured on.
    """

    probe: Probe
    sensitivities: Sensitivities
    seconds: float = 0.0
    minibatch: int = 0
