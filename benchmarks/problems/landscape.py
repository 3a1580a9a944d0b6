"""Problem `tabular`: losses of a real model that were recorded once and are looked up; no model is needed.

landscape                  what                                                        assignments       optimum
pairs-3, pairs-4, pairs-5  3, 4, 5 of the 15 pairs of consecutive blocks dropped       455, 1365, 3003   known
smollm2-3bit               210 linear layers at 2 to 6 bits, 3 bits a weight; fitted   10^131            not known

Of the first three every loss is a measurement. The last one is not measured but a smooth function that was fitted to
hundreds of measurements. ``benchmarks/measurements/landscapes/record.py`` recorded them, ``pack.py`` made the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.problems.bits import bits_space
from benchmarks.problems.depth import depth_space
from benchmarks.problems.surrogate import Features, Fit
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.search.searcher import one_of
from evo_hpo.space.compression_space import Assignment, CompressionSpace

LANDSCAPES = ("pairs-3", "pairs-4", "pairs-5", "smollm2-3bit")
LOSS = "Loss: KL(dense || compressed) on {tokens} tokens of Python's documentation, nats a token"


@dataclass(frozen=True)
class Recorded:
    """A data file.

    Attributes:
        arrays: what it holds.
        about: model, text, date, machine, number of rows; for the surrogate its error.
        digest: of the whole file.
    """

    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]
    digest: str


@lru_cache(maxsize=8)
def read(name: str) -> Recorded:
    """One of the data files beside this package: pairs, blocks, bits."""
    with as_file(files("benchmarks.problems") / "data" / f"smollm2-{name}.npz") as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
    return Recorded(arrays, json.loads(str(arrays.pop("about"))), digest)


class RecordedProblem(FunctionProblem):
    """A recorded landscape; the same assignment has the same loss, always.

    Attributes:
        notes: what the reader of a report should know about it.
    """

    def __init__(
        self,
        space: CompressionSpace,
        function: Callable[[Assignment], float],
        name: str,
        recorded: Recorded,
        notes: tuple[str, ...],
        optimum: float | None = None,
    ) -> None:
        super().__init__(space, function, name, optimum=optimum)
        self.notes = (LOSS.format(tokens=recorded.about["tokens"]), *notes)
        self._digest = recorded.digest

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "data": self._digest}


@lru_cache(maxsize=8)
def tabular(landscape: str = "pairs-5") -> RecordedProblem:
    """Losses recorded from SmolLM2-135M: dropped blocks (exhaustive, optimum known) or 3-bit levels (surrogate).

    Args:
        landscape: pairs-3, pairs-4, pairs-5 or smollm2-3bit.

    Raises:
        InvalidSettingError: no such landscape.
    """
    one_of("landscape", landscape, *LANDSCAPES)
    return _bits() if landscape == "smollm2-3bit" else _depth(*landscape.split("-"))


def _depth(kind: str, count: str) -> RecordedProblem:
    recorded, drop = read(kind), int(count)
    size = 2 if kind == "pairs" else 1
    space = depth_space(recorded.about["blocks"], size, drop)
    kept = recorded.arrays["kept"]
    chosen = kept.sum(axis=1) == space.budget
    table = dict(zip(map(tuple, kept[chosen].tolist()), _means(recorded)[chosen].tolist(), strict=True))
    what = "pairs of consecutive blocks" if size == 2 else "blocks"
    return RecordedProblem(
        space,
        table.__getitem__,
        f"SmolLM2-135M, {drop} of {len(space)} {what} dropped (recorded)",
        recorded,
        (f"Exhaustive: each of the {len(table):,} assignments was measured",),
        min(table.values()),
    )


def _bits() -> RecordedProblem:
    recorded = read("bits")
    space, about = bits_space(), recorded.about
    return RecordedProblem(
        space,
        fitted(recorded),
        "SmolLM2-135M, 3 bits (surrogate of recorded losses)",
        recorded,
        (
            f"Not measured: a surrogate fitted to {about['rows']:,} measured assignments; off by"
            f" {about['error']['all']['median']:.1%} (median) on rows it had not seen, and by"
            f" {about['error']['best']['median']:.1%} among the best tenth; where a search ends it may be off by more",
        ),
    )


def fitted(recorded: Recorded) -> Fit:
    """The surrogate as it was shipped, not fitted again: the same numbers on every machine."""
    arrays = recorded.arrays
    features = Features.of(bits_space())
    count = len(arrays["linear"])
    quadratic = np.zeros((count, count))
    quadratic[np.triu_indices(count)] = arrays["quadratic"]
    return Fit(features, float(arrays["constant"]), arrays["linear"].astype(np.float64), (quadratic + quadratic.T) / 2)


def _means(recorded: Recorded) -> NDArray[np.float64]:
    """Mean over the sequences, float64."""
    return np.asarray(recorded.arrays["losses"].astype(np.float64).mean(axis=1))
