"""EvoPress's offspring: distinct mutants of the parents, and what is known of every assignment that was tried."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.mutation import SwitchCount, Uniforms, heavy_tailed, mutation, switch_counts
from searchers.evopress.settings import Settings

PATIENCE = 100_000  # draws in vain of one generation, whatever the number of offspring
PERSISTENCE = 1000  # draws of any number of switches before the search gives up


@dataclass(frozen=True, slots=True)
class Candidate:
    """An assignment that competes: number of its parent's trial, of its own, and its exact loss, where these are known.

    An exact loss is one on the last stage's data that no second look would change.
    """

    levels: Assignment
    parent: int | None = None
    number: int | None = None
    loss: float | None = None


class Tried(dict[Assignment, tuple[int | None, float | None]]):
    """First trial and exact loss of each assignment; no loss: it failed."""

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps exact losses, and that an assignment was tried at all."""
        for outcome in outcomes:
            loss = outcome.loss if outcome.usable else None
            number, known = self.setdefault(outcome.trial.levels, (outcome.trial.number, loss))
            if loss is not None and loss != known:
                self[outcome.trial.levels] = (number, loss)

    def candidate(self, levels: Assignment, number: int | None = None) -> Candidate:
        """With what is known of it."""
        first, loss = self.get(levels, (None, None))
        return Candidate(levels, number=first if number is None else number, loss=loss)


class Breeding:
    """Draws offspring.

    Args:
        space: of the assignments.
        stream: the randomness.
        settings: which mutation, and how many switches of it; their ``group`` says which units are neighbours.
    """

    def __init__(self, space: CompressionSpace, stream: Uniforms, settings: Settings) -> None:
        self.space = space
        self.stream = stream
        self.mutate = mutation(space, settings.group, settings.cross_group)
        self.switches = switch_counts(settings.switch_rule, settings.max_switches)
        self.far_switches = heavy_tailed(len(space))
        self.group = settings.group

    def breed(
        self,
        count: int,
        parents: Sequence[Candidate],
        seen: set[Assignment],
        barred: Collection[Assignment],
        *,
        wide: bool,
    ) -> list[Candidate]:
        """Up to ``count`` distinct mutants, neither ``seen`` (which they join) nor ``barred``; fewer where fewer exist.

        Around a local optimum the neighbours run out where those measured are barred, and the search looks further
        away instead of at the same ones. ``wide``: the number of switches has a heavy tail.
        """
        usual = self.far_switches if wide else self.switches
        return (
            self._draw(count, usual, parents, seen, barred, min(50 + 10 * count, PATIENCE))
            or self._neighbours(count, parents, seen, barred)
            or self._draw(count, lambda s: 1 + s.below(len(self.space)), parents, seen, barred, PERSISTENCE)
        )

    def _draw(
        self,
        count: int,
        switches: SwitchCount,
        parents: Sequence[Candidate],
        seen: set[Assignment],
        barred: Collection[Assignment],
        patience: int,
    ) -> list[Candidate]:
        """Up to ``count`` random mutants; gives up after ``patience`` draws in vain."""
        found: list[Candidate] = []
        stream, mutate = self.stream, self.mutate
        failures = 0
        while len(found) < count and failures < patience:
            parent = parents[stream.below(len(parents)) if len(parents) > 1 else 0]
            levels = mutate(parent.levels, stream, switches(stream))
            if levels is not None:
                before = len(seen)
                seen.add(levels)  # hashing a long tuple is what a draw costs, so it is added and looked up at once
                if len(seen) > before and levels not in barred:
                    found.append(Candidate(levels, parent.number))
                    continue
            failures += 1
        return found

    def _neighbours(
        self, count: int, parents: Sequence[Candidate], seen: set[Assignment], barred: Collection[Assignment]
    ) -> list[Candidate]:
        """Up to ``count`` of the parents' unseen neighbours, at random: chance may have missed a lone one."""
        left = {
            levels: Candidate(levels, parent.number)
            for parent in parents
            for levels in self.space.switches(parent.levels, self.group)
            if levels not in seen and levels not in barred
        }
        able = list(left.values())
        return [able.pop(self.stream.below(len(able))) for _ in range(min(count, len(able)))]

    def exist(self, parents: Sequence[Candidate]) -> bool:
        """True where any parent has a neighbour."""
        return any(True for p in parents for _ in self.space.switches(p.levels, self.group))
