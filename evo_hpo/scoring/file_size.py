"""Budgets in bytes of the exported file: what is searched, and what stands in it beside (embedding, head, norms)."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.levels.ggml import tensor_names
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.packed_size import HEADER
from evo_hpo.models.loading import source_gguf
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.scoring.footprint import configuration, empty_model
from evo_hpo.space.amounts import Amount, shown
from evo_hpo.space.compression_space import Assignment, CompressionSpace


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
            InvalidSettingError: the size of a GGUF file that has no template, or of which only some experts of a block
                are searched.
        """
        empty = empty_model(configuration(model))
        parameters = {id(p): (name, p.numel()) for name, p in empty.named_parameters()}
        units = levels.counted_in("bytes").units  # sizes in weights, also where modules are counted
        weights, searched = sum(n for _, n in parameters.values()), sum(unit.size for unit in units)
        found = {member for unit in units for member in unit.members}
        if is_gguf(levels):
            return cls(weights, searched, _rest_of_gguf(model, searched, found, len(decoder_blocks(empty))))
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


def is_gguf(levels: LevelSet) -> bool:
    """Whether a file of these levels is a GGUF file."""
    return any(c.level.settings.get("kind") == "ggml" for _, rows in levels.rows() for row in rows for c in row)


def _rest_of_gguf(model: str, searched: int, modules: Set[str], blocks: int) -> int:
    """Bytes of the file that a model was read from, without the tensors of the searched modules."""
    path = source_gguf(model)
    if path is None:
        raise InvalidSettingError(
            "size= of a GGUF file needs a model that was read from one, whose header and other tensors are taken over:"
            " name an F16 file as the model, or give average= in bits a weight"
        )
    from gguf import GGUFReader

    reader = GGUFReader(path)
    named = tensor_names(reader.fields["general.architecture"].contents(), blocks)
    names = {named(f"{module}.weight") for module in modules}
    found = [tensor for tensor in reader.tensors if tensor.name in names]
    if (count := sum(int(t.n_elements) for t in found)) != searched:
        raise InvalidSettingError(
            f"size= of a GGUF file needs all experts of a block searched, which are one tensor: {searched} of {count}"
            " weights are; give average="
        )
    return path.stat().st_size - sum(-(-int(t.n_bytes) // 32) * 32 for t in found)
