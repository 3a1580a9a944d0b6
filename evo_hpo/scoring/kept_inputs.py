"""Block inputs of the best assignment so far on a minibatch that is used again.

Fresh minibatches never need it: candidates of one batch share prefixes among themselves. It pays where a searcher asks
for one or a few assignments at a time on the same minibatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from evo_hpo.scoring.prefixes import Signature

Path = Mapping[int, Tensor]
"""Block number -> its input (sequences x length x hidden); every number from 1 on, or none."""


@dataclass(frozen=True, slots=True)
class KeptPath:
    """An assignment's path on one group of sequences."""

    signature: Signature
    path: Path


@dataclass
class KeptPaths:
    """Keeps the paths of one assignment within a memory limit.

    Args:
        limit: bytes for the paths of the reference, and of a call's candidates while it runs.
    """

    limit: int
    minibatch: tuple[int | None, int] | None = None
    loss: float = float("inf")
    _paths: dict[tuple[int, ...], KeptPath] = field(default_factory=dict)

    def begin(self, minibatch: tuple[int | None, int], path_bytes: int, candidates: int) -> bool:
        """Whether the candidates of a call on this minibatch should bring their paths back.

        Args:
            minibatch: seed and number of sequences; only the minibatch of the call before is worth it.
            path_bytes: memory of one candidate's path on the whole minibatch.
        """
        repeated = minibatch == self.minibatch
        if not repeated:
            self.clear()
            self.minibatch = minibatch
        return repeated and (candidates + 1) * path_bytes <= self.limit

    def get(self, sequences: tuple[int, ...]) -> KeptPath | None:
        """The reference's path on these sequences."""
        return self._paths.get(sequences)

    def offer(self, loss: float, paths: Mapping[tuple[int, ...], KeptPath]) -> None:
        """Makes an assignment the reference if its loss is lower than the present one's."""
        if loss < self.loss:
            self.loss, self._paths = loss, dict(paths)

    def clear(self) -> None:
        """Forgets everything, when the minibatch changes or memory runs out."""
        self.minibatch, self.loss, self._paths = None, float("inf"), {}
