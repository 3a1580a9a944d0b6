"""A language model, the levels of its units, and its data as a problem for the search."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from evo_hpo.errors import InvalidSettingError
from evo_hpo.models.identity import tokens_identity
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.rounds import COUNTED, Sums
from evo_hpo.scoring.sampling import check_tokens
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.space.compression_space import Assignment, CompressionSpace

FIGURES = ("loss", "cross_entropy", "perplexity", "average", "gap")
"""What is said of a held-out text, and so the name of none."""

REPORTED = ("device", "dtype", "threads", "batch_size", "chunk", "compiled", *COUNTED)


class LanguageModelProblem(Problem):
    """Assignments scored by an :class:`Evaluator`, validated on held-out text.

    Args:
        evaluator: model, levels and calibration pool.
        space: the evaluator's units under a budget.
        held_out: int64, sequences x length; text that is not in the pool, or several by name: the first is ``loss``.
        tokens: calibration tokens of a trial that names none; a multiple of the sequence length.
        name: shown in tables.
        errors: layer-wise error of each level of each unit, as the level store knows it.

    Raises:
        InvalidSettingError: ``tokens`` is not a multiple of the sequence length or above the pool.
    """

    has_sensitivities = True
    counted = COUNTED

    def __init__(
        self,
        evaluator: Evaluator,
        space: CompressionSpace,
        held_out: Tensor | Mapping[str, Tensor],
        *,
        tokens: int,
        name: str,
        errors: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self._errors = errors
        self.evaluator, self.space, self.name = evaluator, space, name
        named = {"": held_out} if isinstance(held_out, Tensor) else dict(held_out)
        self.texts = tuple(filter(None, named))
        self.held_out, *self._others = named.values()
        self.pool_tokens = int(evaluator.tokens.numel())
        self.check(tokens)
        self.tokens = tokens
        self.reading = evaluator.reading()
        self._validated: dict[Assignment | None, dict[str, float]] = {}

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        """Losses on one minibatch, nats a token, lower is better; see :meth:`Evaluator.score`."""
        return self.evaluator.score(assignments, minibatch, keep=keep)

    def read(self, assignments: Sequence[Assignment], groups: Sequence[Sequence[int]]) -> Sums:
        """Sums over each sequence's positions; see :meth:`Evaluator.read`."""
        return self.evaluator.read(assignments, groups)

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Of the units' levels, by one backward pass; see :meth:`SensitivityPass.measure`."""
        if kind == "layerwise":
            return self._layerwise()
        return self._gradients.measure(assignment, minibatch, kind, form)

    def _layerwise(self) -> Sensitivities:
        if self._errors is None:
            raise InvalidSettingError(f"problem {self.name!r} knows no layer-wise errors: take another searcher")
        width = max(map(len, self._errors))
        padded = [[*row, *[np.nan] * (width - len(row))] for row in self._errors]
        return Sensitivities("layerwise", None, np.array([padded], dtype=np.float32), 1, 0)

    @cached_property
    def _gradients(self) -> SensitivityPass:
        evaluator = self.evaluator
        found, stream, inputs = evaluator, evaluator.stream, evaluator.inputs
        return SensitivityPass(
            found.model, found.levels, found.tokens, stream=stream, inputs=inputs, pool=evaluator.pool
        )

    def validate(self, assignment: Assignment) -> dict[str, float]:
        """Held-out ``loss`` (KL from the uncompressed model, nats a token), ``cross_entropy`` and ``perplexity``.

        Computed once for each assignment; of each text after the first under its name, with its ``gap``.
        """
        return dict(self._held_out(tuple(assignment)))

    def reference(self) -> dict[str, float]:
        """The uncompressed model's held-out figures."""
        # its divergence from itself is zero; what is computed is rounding
        return {k: 0.0 if k.endswith(("loss", "gap")) else v for k, v in self._held_out(None).items()}

    def check(self, tokens: int) -> None:
        """Raises InvalidSettingError when no minibatch of this many tokens can be drawn."""
        check_tokens(tokens, len(self.evaluator.tokens), self.evaluator.length)

    def report(self) -> dict[str, Any]:
        """Device, dtype, threads, batch; candidates, tokens, losses that were not finite, times that memory ran out."""
        told = self.evaluator.report()
        return {name: told[name] for name in REPORTED} | {
            "measured": [[what, round(rate, 1)] for what, rate in told["measured"]]
        }

    def fingerprint(self) -> dict[str, Any]:
        """Space, fitness, and the identity of model, tokenizer, store, calibration pool, held-out text and dtype."""
        identity = {**self.evaluator.identity, "held-out text": tokens_identity(self.held_out)}
        for name, text in zip(self.texts[1:], self._others, strict=True):
            identity[f"held-out text {name}"] = tokens_identity(text)
        return {**super().fingerprint(), "fitness": self.evaluator.fitness, "identity": identity}

    def _held_out(self, assignment: Assignment | None) -> dict[str, float]:
        if assignment not in self._validated:
            found = self._figures(assignment, self.held_out)
            for name, text in zip(self.texts[1:], self._others, strict=True):
                own = self._figures(assignment, text)
                own["gap"] = own["loss"] - found["loss"]
                found |= {f"{name}/{k}": v for k, v in own.items()}
            self._validated[assignment] = found
        return self._validated[assignment]

    def _figures(self, assignment: Assignment | None, text: Tensor) -> dict[str, float]:
        figures = self.evaluator.evaluate_held_out(assignment, text)
        return {k: v for k, v in figures.items() if isinstance(v, float)}


def check_names(held_out: str | Mapping[str, str]) -> None:
    """Raises InvalidSettingError where held-out texts have no names that figures can be called by."""
    if isinstance(held_out, str):
        return
    if not held_out or not all(isinstance(text, str) for text in held_out.values()):
        raise InvalidSettingError(f"held_out={held_out!r:.120} must be a text, or name = text for several")
    for name in held_out:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) or name in FIGURES:
            raise InvalidSettingError(
                f"held_out: {name!r:.60} must be 1 to 40 letters, digits, dashes and underscores, and none of"
                f" {', '.join(FIGURES)}"
            )
