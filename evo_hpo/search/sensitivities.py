"""What one backward pass tells of every level of every unit: a prediction of what moving there would cost.

For a sequence s, unit u and level l, the projection is p[s, u, l] = g_s . (W_l - W_reference), with g_s the gradient of
one of the following, summed over the sequence's predicted tokens:

    sampled   log-likelihood of labels that are drawn from the model's own distribution
    true      log-likelihood of the text's own next tokens
    kl        KL divergence from the uncompressed model

Other forms (:data:`Form`) take less of the gradient than its inner product with the change. The kind ``layerwise`` has
no gradient: the error that each level makes of its layer's output by itself, known since the levels were made.

With sampled labels mean_s p^2 / 2 / positions is the curvature of the KL along the change (the Fisher information is
the Gauss-Newton matrix; Martens, "New insights and perspectives on the natural gradient method", 2020), with true
labels it is the empirical Fisher; mean_s p / positions of ``kl`` is the first-order change of the loss.

p is the sum of what the layer does in each part of the sequence. These parts are almost uncorrelated, so the sum of
their squares tells the same curvature with a fraction of the noise of p^2, a single number squared (on SmolLM2, with
eight parts, 0.97 times the curvature at a quarter of the variance).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from evo_hpo.errors import InvalidSettingError
from evo_hpo.space.compression_space import Assignment

Kind = Literal["sampled", "true", "kl", "layerwise"]
"""Which gradient is projected; see the module."""

Form = Literal["inner", "absolute", "output", "trace"]
"""What is taken of a sequence's gradient g and a change d of weights:

    inner      g . d
    absolute   sum of |g d| over the weights, d counted from the uncompressed weights; as a first-order effect
    output     root of the sum of (h y)^2 over the layer's outputs at all positions: y their change, h their gradient
    trace      |g| |d| / root of the number of weights: a Hessian that is a multiple of the identity
"""

READS = 3
"""Tokens charged for a token that is read forward (one) and backward (two)."""


def check_kind(kind: str, assignment: Assignment | None, form: str = "inner") -> None:
    """Raises InvalidSettingError for an unknown kind or form, or a kind that says nothing at this reference."""
    if kind not in get_args(Kind):
        raise InvalidSettingError(f"kind={kind!r} must be one of: {', '.join(get_args(Kind))}")
    if form not in get_args(Form):
        raise InvalidSettingError(f"form={form!r} must be one of: {', '.join(get_args(Form))}")
    if kind == "layerwise" and (assignment is not None or form != "inner"):
        raise InvalidSettingError("kind='layerwise' is of the uncompressed model and has no form: leave both out")
    if kind == "kl" and assignment is None:
        raise InvalidSettingError("kind='kl' at the uncompressed model: its gradient is zero there; use 'sampled'")


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Projections of per-sequence gradients on the change that each level of each unit is.

    Attributes:
        kind: see :data:`Kind`.
        reference: the assignment it was measured at; None: the uncompressed model.
        projections: float32, sequences x units x levels (the most that any unit has), nats; zero at the reference's
            own level, NaN where a unit has fewer levels.
        positions: predicted tokens of a sequence that each projection is the sum of.
        tokens: tokens charged, :data:`READS` for each token that was read.
        form: see :data:`Form`.
        squares: sums over the parts of a sequence of their squared projections, alike; None: parts were not measured.
    """

    kind: Kind
    reference: Assignment | None
    projections: NDArray[np.float32]
    positions: int
    tokens: int
    form: Form = "inner"
    squares: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind, self.reference, self.form)
        array = np.array(self.projections, dtype=np.float32)
        if array.ndim != 3 or not len(array) or self.positions < 1:
            raise InvalidSettingError(
                f"projections of shape {array.shape}, positions={self.positions}: give sequences x units x levels, at"
                " least one sequence and one position"
            )
        array.setflags(write=False)
        object.__setattr__(self, "projections", array)
        if self.squares is not None:
            squares = np.array(self.squares, dtype=np.float32)
            if squares.shape != array.shape:
                raise InvalidSettingError(f"squares of shape {squares.shape} must be of {array.shape}, as projections")
            squares.setflags(write=False)
            object.__setattr__(self, "squares", squares)

    def effects(self) -> NDArray[np.float64]:
        """Predicted change of the loss when one unit alone moves (units x levels, nats a token, lower is better)."""
        return np.asarray(self._samples().mean(axis=0))

    def noise(self) -> NDArray[np.float64]:
        """Variance of :meth:`effects` by the choice of sequences (units x levels); infinite for a single sequence."""
        samples = self._samples()
        if len(samples) < 2:
            return np.full(samples.shape[1:], np.inf)
        return np.asarray(samples.var(axis=0, ddof=1) / len(samples))

    def factors(self) -> NDArray[np.float64]:
        """F, sequences x units x levels, of low rank: moving to levels a predicts |sum_u F[:, u, a_u]|^2 / 2.

        So F[:, u, l] . F[:, v, m] is the cross term of two units, beside which :meth:`effects` are the squares.
        ``kl`` has no curvature, and the other forms have lost the signs.
        """
        if self._linear or self.form != "inner":
            raise InvalidSettingError(
                f"kind={self.kind!r}, form={self.form!r} has no cross terms: use 'sampled' or 'true', and 'inner'"
            )
        return np.asarray(self.projections / np.sqrt(float(len(self.projections) * self.positions)))

    def curvatures(self) -> NDArray[np.float64]:
        """The curvature of every sequence (sequences x units x levels, nats a token) with the least noise: from its
        parts, where they were measured.

        Raises:
            InvalidSettingError: this kind or form has none.
        """
        if self._linear:
            raise InvalidSettingError(f"kind={self.kind!r}, form={self.form!r} has no curvature: use 'sampled'")
        if self.squares is None:
            return self._samples()
        return np.asarray(self.squares.astype(np.float64) / 2 / self.positions)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON: the arrays as base64 of little-endian float32."""
        return {
            "kind": self.kind,
            "reference": None if self.reference is None else list(self.reference),
            "shape": list(self.projections.shape),
            "projections": _text(self.projections),
            "positions": self.positions,
            "tokens": self.tokens,
            **({} if self.form == "inner" else {"form": self.form}),
            **({} if self.squares is None else {"squares": _text(self.squares)}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sensitivities:
        """The same bits again."""
        return cls(
            data["kind"],
            None if data["reference"] is None else tuple(map(int, data["reference"])),
            _array(data["projections"], data["shape"]),
            int(data["positions"]),
            int(data["tokens"]),
            data.get("form", "inner"),
            _array(data["squares"], data["shape"]) if "squares" in data else None,
        )

    @property
    def _linear(self) -> bool:
        """Whether a projection is an effect itself, not its root."""
        return self.kind in ("kl", "layerwise") or self.form == "absolute"

    def _samples(self) -> NDArray[np.float64]:
        p = self.projections.astype(np.float64)
        return (p if self._linear else np.square(p) / 2) / self.positions


def _text(array: NDArray[np.float32]) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def _array(text: str, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape)
