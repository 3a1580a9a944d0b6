"""Budgets in bytes of the exported file: what is searched, and what stands in it beside (embedding, head, norms)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.packed_size import HEADER
from evo_hpo.models.loading import source_gguf
from evo_hpo.models.structure import outer_matrices
from evo_hpo.scoring.footprint import configuration, empty_model
from evo_hpo.space.amounts import Amount, shown
from evo_hpo.space.compression_space import Assignment, CompressionSpace

SEARCHED = r"blk\.\d+\.(attn_[qkv]|attn_output|ffn_(gate|up|down)(_exps)?)\.weight"
"""Tensors of a GGUF file's blocks that are searched."""

OUTER = ("token_embd.weight", "output.weight")
"""Those of embedding and head."""


@dataclass(frozen=True)
class FileSize:
    """What an exported file holds.

    Attributes:
        weights: of the whole model, shared ones once.
        searched: of them, those of the levels' units.
        rest: bytes of everything else: 2 a weight that is not searched, and the file's header, counted from above; in a
            GGUF file, what its template has.
    """

    weights: int
    searched: int
    rest: int

    @classmethod
    def of(cls, model: str, levels: LevelSet) -> FileSize:
        """For the levels of a model, which is not loaded.

        Raises:
            InvalidSettingError: the size of a GGUF file that has no template, or of which not every layer is searched.
        """
        empty = empty_model(configuration(model))
        parameters = {id(p): (name, p.numel()) for name, p in empty.named_parameters()}
        units = levels.counted_in("bytes").units  # sizes in weights, also where modules are counted
        weights, searched = sum(n for _, n in parameters.values()), sum(unit.size for unit in units)
        found = {member for unit in units for member in unit.members}
        if any(c.level.settings.get("kind") == "ggml" for _, rows in levels.rows() for row in rows for c in row):
            outer = [tensor for name, tensor in zip(outer_matrices(empty), OUTER, strict=False) if name in found]
            return cls(weights, searched, _rest_of_gguf(model, searched, outer))
        names = [name for name, _ in parameters.values() if name.removesuffix(".weight") not in found]
        return cls(weights, searched, 2 * (weights - searched) + sum(len(n) + HEADER for n in names) + HEADER)

    def space(self, levels: LevelSet, size: str) -> CompressionSpace:
        """The search space in which no file is larger than a size.

        Args:
            levels: counted in bytes.

        Raises:
            InfeasibleError: the size is below the smallest file or above the largest.
        """
        budget = Amount.of(size).total(self.weights) - self.rest
        whole = CompressionSpace(levels.units, max(1, sum(unit.costs[-1] for unit in levels.units)))  # type: ignore[misc]
        least, most = whole.cost(whole.lowest), whole.cost(whole.highest)
        if not least <= budget <= most:
            smallest, largest = self.rest + least, self.rest + most
            raise InfeasibleError(
                f"size={size!r} is outside what the levels allow: the file takes {shown(smallest)} to {shown(largest)}"
                f" ({self.bits(smallest):.3f} to {self.bits(largest):.3f} bits a weight), {shown(self.rest)} of it"
                f" embedding, head and norms{self._uniform(levels)}"
            )
        return CompressionSpace(levels.units, budget, resources=("bytes",))

    def _uniform(self, levels: LevelSet) -> str:
        """What each level that all units have takes."""
        return "".join(f"; {n}: {shown(taken)}" for n, taken, _ in self.rows(levels) if n.startswith("uniform"))

    def bits(self, size: int) -> float:
        """Bits a weight of a file of so many bytes, over all weights of the model."""
        return 8 * size / self.weights

    def rows(self, levels: LevelSet) -> Iterator[tuple[str, int, Assignment]]:
        """What the landmarks of the levels take, smallest first.

        Yields:
            Name, bytes of the file, assignment.
        """
        for name, (assignment, cost) in levels.counted_in("bytes").landmarks().items():
            yield name, self.rest + cost, assignment


def _rest_of_gguf(model: str, searched: int, outer: Sequence[str]) -> int:
    """Bytes of the file that a model was read from, without its searched tensors; ``outer``: of them, those outside."""
    path = source_gguf(model)
    if path is None:
        raise InvalidSettingError(
            "size= of a GGUF file needs a model that was read from one, whose header and other tensors are taken over:"
            " name an F16 file as the model, or give average= in bits a weight"
        )
    from gguf import GGUFReader

    found = [t for t in GGUFReader(path).tensors if t.name in outer or re.fullmatch(SEARCHED, t.name)]
    if (count := sum(int(t.n_elements) for t in found)) != searched:
        raise InvalidSettingError(
            f"size= of a GGUF file needs every linear layer searched: {searched} of {count} weights are; give average="
        )
    return path.stat().st_size - sum(-(-int(t.n_bytes) // 32) * 32 for t in found)
