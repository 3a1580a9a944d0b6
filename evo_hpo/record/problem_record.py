"""A problem as its comparison records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evo_hpo.errors import JournalError
from evo_hpo.record.changes import changes, comparable, told
from evo_hpo.search.problem import Problem
from evo_hpo.space.compression_space import CompressionSpace


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
        instances: where every seed has a problem of its own, on the same space: seed -> its ``fingerprint`` and
            ``optimum``. Losses of two instances cannot be compared; reports show gaps.
        texts: names of the held-out texts, the one that names the winner first; empty: there is one, without a name.
        optima: over a range of budgets, cost and loss of the assignments of the best front, where known.
    """

    key: str
    space: CompressionSpace
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    optimum: float | None = None
    describe: str = ""
    notes: tuple[str, ...] = ()
    instances: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    optima: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, key: str, problem: Problem, instance: int | None = None) -> ProblemRecord:
        """The record of a problem that was made; ``instance``: for which seed, where each has its own."""
        fingerprint, optimum, optima = problem.fingerprint(), problem.optimum, problem.optima
        own = {"fingerprint": fingerprint, "optimum": optimum, **({"optima": optima} if optima else {})}
        return cls(
            key,
            problem.space,
            fingerprint,
            problem.reference(),
            optimum,
            problem.space.describe(),
            tuple(problem.notes),
            {} if instance is None else {str(instance): own},
            tuple(problem.texts),
            optima,
        )

    def joined(self, made: ProblemRecord) -> ProblemRecord:
        """The problem, made again or as the instance of another seed.

        Raises:
            JournalError: it is not the one that was recorded: figures would not be comparable.
        """
        pairs = [(self.fingerprint, made.fingerprint)]
        if made.instances:
            again = [seed for seed in made.instances if seed in self.instances]
            pairs = [(self.instances[seed]["fingerprint"], made.instances[seed]["fingerprint"]) for seed in again]
        for old, new in pairs:
            if changed := changes(*comparable(old, new, f"problem {self.key!r}")):
                raise JournalError(
                    f"problem {self.key!r} is not the one this comparison started with ({told(changed)})"
                )
        if made.space.to_json() != self.space.to_json():
            raise JournalError(f"problem {self.key!r}: its instances differ in their spaces: compare one instance")
        return replace(made, instances={**self.instances, **made.instances})

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
            data.get("instances") or {},
            tuple(map(str, data.get("texts") or ())),
            tuple((int(cost), float(loss)) for cost, loss in data.get("optima") or ()),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data, without its key."""
        names: tuple[str, ...] = ("fingerprint", "reference", "optimum", "describe", "notes")
        names += tuple(name for name in ("instances", "texts", "optima") if getattr(self, name))
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
        if self.instances:
            return "gap to the best known loss", "(uniform = 100)"
        if self.space.ranged:
            kind, unit = ("KL", "nats/token, geometric") if self.is_language_model else ("loss", "over all budgets")
            return f"mean {kind}{f' on {self.texts[0]}' if self.texts else ''}", f"({unit})"
        name = f"on {self.texts[0]}" if self.texts else ""
        if self.is_language_model:
            return (f"KL {name}" if name else "held-out KL"), "(nats/token)"
        return (f"loss {name}" if name else "held-out loss",)

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
        if resource in {unit.group for unit in self.space.units}:  # one resource a group: so many modules of it
            return f"{resource} kept,", "of all modules"
        if resource == "weights":
            return "weights kept,", "share"
        return "stored bits" if resource == "storage" else resource, "a weight"

    @property
    def average_name(self) -> str:
        """:attr:`average_lines` in one."""
        return " ".join(self.average_lines)
