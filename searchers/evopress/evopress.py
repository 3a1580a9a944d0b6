"""EvoPress: a (mu + lambda) evolutionary search with level-switch mutation and multi-step selection.

Sieberling, Kuznedelev, Kurtic, Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025 (arXiv 2410.14649), algorithm 1. Where this differs from the published search, a setting says so and switches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import passes_on
from evo_hpo.search.trial import Batch, Draw, Outcome, Terms
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.acceptance import PairedAcceptance
from searchers.evopress.initialisation import initialisation, random_and_spent
from searchers.evopress.inversion import inverted
from searchers.evopress.mutation import Uniforms
from searchers.evopress.offspring import Breeding, Candidate, Tried
from searchers.evopress.selection import rank
from searchers.evopress.settings import Settings, resolved

RESTARTS = 20  # new starts in a row, each without a mutant to measure, before the search gives up


@passes_on(Settings)
class EvoPress(Procedure):
    """(mu + lambda) evolution: distinct mutants of the parents, selected in stages of growing fidelity.

    Args:
        preset: what holds where nothing is given: ``plain``, the defaults, or as published for an application:
            ``depth_pruning``, ``sparsity``, ``quantization`` or ``super_fast``.
        settings: those of :class:`Settings`; None: as the preset says.
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0, preset: str = "plain", **settings: Any) -> None:
        super().__init__(space, seed=seed)
        self.settings = chosen = resolved(preset, settings)
        self.selection = chosen.selection
        self.generations = chosen.most_generations(space)
        self.breeding = Breeding(space, Uniforms(self.rng), chosen)
        self.start = initialisation(space, chosen, seed)
        self.asks_for_sensitivities = chosen.init == "fisher"
        self.paired = PairedAcceptance(chosen.doubt, chosen.minibatches)
        self.generation = 0
        self.stagnant = 0  # generations since the best parent was last a new one
        self.parents: list[Candidate] = []
        self.champion: Candidate | None = None  # best parent of the starts before this one
        self.tried = Tried()
        self._exact = False  # the problem has no fidelity
        self._noiseless = chosen.minibatch == "fixed"  # a loss of the last stage stays what it was

    def fidelities(self) -> tuple[int | None, ...]:
        return tuple(stage.tokens for stage in self.selection.stages)

    def recommend(self) -> Assignment:
        """The champion of earlier starts, or else the parent; before the first generation, the starting point."""
        if self.champion is not None:
            return self.champion.levels
        return self.parents[0].levels if self.parents else self.start.best()

    def steps(self) -> Steps[None]:
        return inverted(self._evolve()) if self.settings.invert else self._evolve()

    def _evolve(self) -> Steps[None]:
        """From the start, generation after generation, towards the least loss that it is told."""
        if not self.allowance.default_tokens:
            self._exact = self._noiseless = True  # a loss stays what it was, and nothing needs a second look
            self.selection = self.selection.in_one_stage()
        yield from self._begin()
        while self.generation < self.generations:
            yield None  # a generation shrinks to what is left to spend
            if self.settings.restart_after is not None and self.stagnant >= self.settings.restart_after:
                self._restart()
            offspring = self._breed()
            if not offspring and not self._asked:
                yield from self._score_the_start()
                continue
            for _ in range(RESTARTS if self.settings.restart_after is not None else 0):
                if offspring or self.stop_reason:
                    break
                self._restart()
                offspring = self._breed()
            if not offspring:
                self.stop_reason = self.stop_reason or self._why_none()
                return
            self.generation += 1
            yield from self._select_in_stages(offspring)
        self.stop_reason = f"all {self.generations} generations are done"

    def _begin(self) -> Steps[None]:
        """Moves to the starting point; its loss counts where it is of the last stage's fidelity."""
        outcomes = yield from self.start.steps(self)
        if self._exact:
            self.tried.keep(outcomes)
        default, decided = self.allowance.default_tokens, self.start.chosen
        one = len({tokens or default for tokens in (self.start.tokens, self.selection.stages[-1].tokens)}) == 1
        if decided is not None and self._noiseless and (one or not default):
            self.tried[decided.trial.levels] = (decided.trial.number, decided.loss)
        self.parents = [self.tried.candidate(self.start.best(), self.start.number)]

    def _breed(self) -> list[Candidate]:
        """As many offspring as the whole generation can be paid for, none equal to a parent or champion.

        Where losses are exact, none is measured twice, unless revisits are wanted.
        """
        elders = self._elders()
        paid_again = sum(not self._remembered(e) for e in elders)
        count = self.selection.affordable(self.settings.offspring, paid_again, self.allowance)
        if not count:
            self.stop_reason = "the budget does not pay for another generation"
            return []
        barred = self.tried if self._noiseless and not self.settings.revisit else ()
        wide = self.settings.widen_after is not None and self.stagnant >= self.settings.widen_after
        return self.breeding.breed(count, self.breeders(), {e.levels for e in elders}, barred, wide=wide)

    def breeders(self) -> Sequence[Candidate]:
        """Whose mutants the next offspring are."""
        return self.parents

    def _select_in_stages(self, offspring: list[Candidate]) -> Steps[None]:
        """Scores the offspring in stages of growing fidelity, each on one minibatch, and selects the next parents."""
        draw: Draw = "fixed" if self.settings.minibatch == "fixed" else "fresh"
        last = len(self.selection.stages) - 1
        for number, stage in enumerate(self.selection.stages):
            if not self.selection.needed(len(offspring), number):
                continue
            joining = self._elders() if self.selection.joins(number) else []
            elders = [e for e in joining if not self._remembered(e)]
            if elders and elders[0].number is None:  # a starting point, first scored by the next trial
                offspring = [replace(c, parent=self._asked) if c.parent is None else c for c in offspring]
            # A champion must not take the place of the offspring that would be the next parent.
            keep = stage.survivors + any(e is self.champion for e in elders)
            trials = [self.trial(e.levels, e.parent if e.number is None else e.number, "parent") for e in elders]
            trials += [self.trial(c.levels, c.parent) for c in offspring]
            decides = number == last and self.settings.acceptance == "paired" and not self._noiseless
            terms = Terms(stage.tokens, draw, None if decides else keep, self.generation, number, by_sequence=decides)
            outcomes = yield Batch(tuple(trials), terms)
            if self.settings.minibatch == "nested":
                draw = "same"
            scored = sorted(zip(outcomes, [*elders, *offspring], strict=False), key=lambda pair: rank(pair[0]))
            if number == last:
                if decides:
                    scored = yield from self.paired.settle(self, scored, self.parents[0])
                self._replace_parents(scored)
                return
            # Parents that compete may take the place of offspring here, as published; a champion of an earlier start
            # not.
            rivals = [c for o, c in scored if o.status != "failed" and c is not self.champion]
            parents = {id(p) for p in self.parents}
            offspring = [c for c in rivals[: stage.survivors] if id(c) not in parents]
            if not offspring:
                self.stagnant += 1
                return

    def _score_the_start(self) -> Steps[None]:
        """A start without a mutant, or with none that the budget pays, is scored: it is what the search recommends."""
        self.stop_reason = ""
        last = len(self.selection.stages) - 1
        outcomes = yield self.propose(
            [self.parents[0].levels], note="parent", tokens=self.selection.stages[-1].tokens, stage=last
        )
        self._replace_parents(list(zip(outcomes, self.parents, strict=False)))

    def _replace_parents(self, scored: list[tuple[Outcome, Candidate]]) -> None:
        """The next parents from the outcomes of the last stage, best first."""
        if self._noiseless:
            self.tried.keep([outcome for outcome, _ in scored])
        losses = [(outcome.loss, candidate) for outcome, candidate in scored if outcome.usable]
        numbers = {id(candidate): outcome.trial.number for outcome, candidate in scored if outcome.usable}
        if self._noiseless and self.selection.elitism != "none":
            losses += [(p.loss, p) for p in self.parents if p.loss is not None and id(p) not in numbers]
        if not losses:
            self.stagnant += 1
            return
        if self.champion is not None:
            losses = self._against(self.champion, losses)
        # Offspring as good as their parent replace it: equal losses let the search drift across plateaus.
        old = {id(p) for p in self.parents}
        losses.sort(key=lambda pair: (pair[0], id(pair[1]) in old))
        chosen = losses[: self.selection.population]
        self.stagnant = 0 if id(chosen[0][1]) not in old else self.stagnant + 1
        self.parents = [
            replace(
                candidate,
                number=numbers.get(id(candidate)) if candidate.number is None else candidate.number,
                loss=loss if self._noiseless and math.isfinite(loss) else None,
            )
            for loss, candidate in chosen
        ]

    def _against(self, champion: Candidate, losses: list[tuple[float, Candidate]]) -> list[tuple[float, Candidate]]:
        """All but the champion, which is one no longer where another is better; the parent where there is no other."""
        others = [(loss, c) for loss, c in losses if c.levels != champion.levels]
        own = next((loss for loss, c in losses if c.levels == champion.levels), champion.loss)
        mark = math.inf if own is None else own
        if others and min(loss for loss, _ in others) < mark:
            self.champion = None
        elif self._noiseless and own is not None:
            self.champion = replace(champion, loss=own)
        return others or [(math.inf, self.parents[0])]

    def _elders(self) -> list[Candidate]:
        return [*self.parents, *([self.champion] if self.champion else [])]

    def _remembered(self, elder: Candidate) -> bool:
        return self._noiseless and elder.loss is not None

    def _restart(self) -> None:
        """Keeps the parent as champion and goes on from a random assignment that spends the budget."""
        if self.champion is None:
            self.champion = self.parents[0]
        self.parents = [self.tried.candidate(random_and_spent(self.space, self.rng))]
        self.stagnant = 0

    def _why_none(self) -> str:
        if not self.generation and not self.breeding.exist(self.parents):
            several = len(self.space.groups(self.breeding.group)) > 1 and not self.settings.cross_group
            return "no feasible mutant of the parent exists" + (": cross_group may give some" if several else "")
        advice = ": restart_after would go on from elsewhere" if self.settings.restart_after is None else ""
        return f"no mutant was found that has not been measured{advice}"
