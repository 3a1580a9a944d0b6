"""A problem as its comparison records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evo_hpo.search.problem import Problem
from evo_hpo.space.compression_space import CompressionSpace

__all__ = ["ProblemRecord"]


@dataclass(frozen=True)
class ProblemRecord:
    """A problem as recorded beside its searches.

    Attributes:
        key: its name in the comparison.
        space: what was searched.
        fingerprint: what made the searches comparable (model, data, space).
        reference: held-out figures of the uncompressed model; empty where there is none.
        optimum: least loss of any feasible assignment, where known.
        describe: of the space, a few lines; ``notes``: what else the reader should know.
    """

    key: str
    space: CompressionSpace
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    optimum: float | None = None
    describe: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: str, problem: Problem) -> ProblemRecord:
        """The record of a problem that was made."""
        return cls(
            key,
            problem.space,
            problem.fingerprint(),
            problem.reference(),
            problem.optimum,
            problem.space.describe(),
            tuple(problem.notes),
        )

    @classmethod
    def from_json(cls, key: str, data: Mapping[str, Any]) -> ProblemRecord:
        """The problem that :meth:`to_json` described."""
        return cls(
            key,
            CompressionSpace.from_json(data["space"]),
            data.get("fingerprint") or {},
            data.get("reference") or {},
            data.get("optimum"),
            data.get("describe") or "",
            tuple(map(str, data.get("notes") or ())),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data, without its key."""
        names = ("fingerprint", "reference", "optimum", "describe", "notes")
        return {"space": self.space.to_json(), **{name: getattr(self, name) for name in names}}

    @property
    def lines(self) -> tuple[str, ...]:
        """What to say above its results: the space without its groups, and the notes."""
        space = [line.strip() for line in self.describe.splitlines() if not line.strip().startswith("group ")]
        return (*space, *self.notes)

    @property
    def is_language_model(self) -> bool:
        """True when the held-out loss is a KL divergence beside a perplexity."""
        return "perplexity" in self.reference

    @property
    def loss_lines(self) -> tuple[str, ...]:
        """Name and unit of the held-out loss, as it may be broken; lower is better."""
        return ("held-out KL", "(nats/token)") if self.is_language_model else ("held-out loss",)

    @property
    def loss_name(self) -> str:
        """:attr:`loss_lines` in one."""
        return " ".join(self.loss_lines)

    @property
    def average_lines(self) -> tuple[str, str]:
        """What the first resource's average over weights is called, as it may be broken."""
        resource = self.space.resources[0]
        if resource == "modules" and all(unit.size == 1 for unit in self.space.units):
            return "modules kept,", "share"
        return ("weights kept,", "share") if resource == "weights" else (resource, "a weight")

    @property
    def average_name(self) -> str:
        """:attr:`average_lines` in one."""
        return " ".join(self.average_lines)
