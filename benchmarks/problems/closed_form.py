"""Sensitivities of synthetic landscapes in closed form: exact, with the noise of a real pass, or misleading.

The loss is quadratic in the roots of the errors, r = sqrt(e): sum_u g_u r_u^2 + sum_{u<v} z_uv r_u r_v. So r takes the
place of a unit's weights, its matrix of second derivatives that of the Fisher information, and 64 tokens that of a
sequence. First order and curvature together are the exact change of one unit.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import READS, Form, Kind, Sensitivities, check_kind
from evo_hpo.space.compression_space import Assignment

Array = np.ndarray[Any, Any]

Quality = Literal["exact", "noisy", "misleading"]
"""``misleading``: noisy, and each unit is told another unit's curvature and slope."""

SEQUENCE = 64
"""Tokens of a sequence."""


def closed_form(
    roots: Array,
    curvature: Array,
    factors: Array,
    assignment: Assignment | None,
    minibatch: Minibatch,
    kind: Kind,
    form: Form,
    quality: str,
) -> Sensitivities:
    """Sensitivities of a landscape.

    Args:
        roots: r of each unit's levels, units x levels; 0: uncompressed.
        curvature: second derivatives of the loss in r, units x units.
        factors: what each sequence multiplies a unit's slope with, sequences x units; their mean is 1.
        quality: see :data:`Quality`; with ``exact`` the effects are exact and the cross terms are of chance.

    Raises:
        InvalidSettingError: an unknown kind, form or quality.
    """
    check_kind(kind, assignment, form)
    if quality not in ("exact", "noisy", "misleading"):
        raise InvalidSettingError(f"sensitivities={quality!r} must be one of: exact, noisy, misleading")
    units = len(roots)
    at = np.zeros(units) if assignment is None else roots[np.arange(units), list(assignment)]
    rng = np.random.default_rng([minibatch.seed, 6 + 90 * minibatch.generated])
    if kind == "kl":
        rows = curvature @ at * (np.ones_like(factors) if quality == "exact" else factors) * SEQUENCE
    elif quality == "exact":
        signs = rng.choice([-1.0, 1.0], size=factors.shape)
        rows = signs * np.sqrt(curvature.diagonal() * SEQUENCE)
    else:
        values, vectors = np.linalg.eigh(curvature)  # as a covariance: what is negative is cut off
        rows = (rng.normal(size=factors.shape) * np.sqrt(np.maximum(values, 0) * SEQUENCE)) @ vectors.T
    if quality == "misleading":
        rows = rows[:, np.random.default_rng([units, 7]).permutation(units)]
    projections = rows[:, :, None] * (roots if form == "absolute" else roots - at[:, None])
    if form != "inner":  # of a unit's one weight, which is its one output too
        projections = np.abs(projections)
    charged = (READS + minibatch.generated) * minibatch.tokens
    return Sensitivities(kind, assignment, projections.astype(np.float32), SEQUENCE, charged, form)
