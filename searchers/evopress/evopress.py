"""EvoPress: a (mu + lambda) evolutionary search with level-switch mutation and multi-step selection.

Sieberling, Kuznedelev, Kurtic, Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025 (arXiv 2410.14649), algorithm 1. Where this differs from the published search, a setting says so and switches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import MANY, boolean, one_of, positive, probability
from evo_hpo.search.trial import Batch, Draw, Outcome, Terms
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.acceptance import PairedAcceptance
from searchers.evopress.initialisation import WARM_STARTS, initialisation, random_and_spent
from searchers.evopress.mutation import Uniforms, mutation, switch_counts
from searchers.evopress.offspring import Breeding, Candidate, Tried
from searchers.evopress.presets import PRESETS, most_generations, resolved
from searchers.evopress.selection import Selection, rank

__all__ = ["PRESETS", "EvoPress"]


RESTARTS = 20  # new starts in a row, each without a mutant to measure, before the search gives up


class EvoPress(Procedure):
    """(mu + lambda) evolution: distinct mutants of the parents, selected in stages of growing fidelity.

    Settings left at None come from the preset.

    Args:
        preset: ``plain`` (4 offspring, one stage, the best survives, half of the offspring exchange across groups),
            ``depth_pruning``, ``sparsity``, ``quantization`` or ``super_fast``.
        offspring: lambda, distinct mutants of a generation.
        survivors: how many each stage keeps; the last entry is the population (mu).
        tokens: calibration tokens of each stage; None in a preset: the problem's default.
        generations: stop after so many; None: as the preset says, ``plain`` goes on until the budget is spent.
        switch_rule: switches an offspring takes: ``min_of_two`` draws from 1..max_switches, or ``fixed``.
        max_switches: see ``switch_rule``.
        group: a switch stays within units of equal ``size``, of equal ``name`` (role), or ``none`` (anywhere).
        cross_group: probability that an offspring exchanges budget across groups; 0 is the published search.
        init: ``uniform``, ``decremented`` (rounded up, then random decrements), ``random``, or what another searcher
            recommends after ``initial_share`` of the budget: ``dynamic_programming``, ``trust_region``, or ``fisher``
            (which spends the share on sensitivities).
        initial: starting points drawn, of which the best on ``initial_tokens`` is taken.
        initial_tokens: calibration tokens of a starting point; None: the first stage's.
        initial_share: share of the budget for a start by another searcher; its trials are charged like all others.
        elitism: parents join the last stage by ``index``, stages by survivor ``count`` (reference), or ``none``.
        minibatch: ``fresh`` for every stage; ``nested`` (a stage's data contains the one before's); ``fixed``.
        widen_after: generations without a new best parent after which the number of switches has a heavy tail (power
            law) until there is one; None: never.
        restart_after: generations without a new best parent after which the search starts anew, or sooner where no
            mutant is left to measure; None: never.
        revisit: let an offspring be an assignment tried before, as published; False (``plain``): not where its loss
            is exact (a problem without fidelity, or ``minibatch="fixed"``) and would only be read once more.
        invert: look for the worst assignment instead.
        acceptance: ``loss``, as published: the least loss of the last stage is the next parent; ``paired``: offspring
            replace it only where they are better sequence by sequence, beyond the error of the difference.
        doubt: p-value of the one-sided paired test below which ``paired`` accepts; 0.16 is about one standard error.
        minibatches: like the last stage's that ``paired`` may read to decide; it stops as soon as it is decided.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        preset: str = "plain",
        offspring: int | None = None,
        survivors: Sequence[int] | None = None,
        tokens: Sequence[int] | int | None = None,
        generations: int | None = None,
        switch_rule: str = "min_of_two",
        max_switches: int = 3,
        group: str = "size",
        cross_group: float | None = None,
        init: str | None = None,
        initial: int | None = None,
        initial_tokens: int | None = None,
        initial_share: float = 0.5,
        elitism: str = "index",
        minibatch: str = "fresh",
        widen_after: int | None = None,
        restart_after: int | None = None,
        revisit: bool | None = None,
        invert: bool = False,
        acceptance: str = "loss",
        doubt: float = 0.16,
        minibatches: int = 4,
    ) -> None:
        super().__init__(space, seed=seed)
        chosen = resolved(
            preset,
            offspring=offspring,
            survivors=survivors,
            tokens=tokens,
            generations=generations,
            cross_group=cross_group,
            init=init,
            initial=initial,
            initial_tokens=initial_tokens,
            revisit=revisit,
        )
        if initial not in (None, 1) and chosen["init"] in ("uniform", *WARM_STARTS):
            raise InvalidSettingError(
                f"initial={initial!r} needs a start that is drawn: init='random' or 'decremented', not {chosen['init']}"
            )
        self.offspring = positive("offspring", chosen["offspring"])
        self.selection = Selection.of(chosen["survivors"], chosen["tokens"], elitism)
        self.generations = most_generations(space, chosen["generations"])
        self.cross_group = probability("cross_group", chosen["cross_group"])
        self.breeding = Breeding(
            space,
            Uniforms(self.rng),
            mutation(space, group, self.cross_group),
            switch_counts(switch_rule, positive("max_switches", max_switches, most=MANY)),
            group,
        )
        self.minibatch = one_of("minibatch", minibatch, "fresh", "nested", "fixed")
        self.widen_after = None if widen_after is None else positive("widen_after", widen_after)
        self.restart_after = None if restart_after is None else positive("restart_after", restart_after)
        if elitism == "none" and not (widen_after is None and restart_after is None):
            raise InvalidSettingError(
                "widen_after and restart_after wait for generations without a new best parent; elitism='none' makes "
                "a new parent of each: leave them out, or let parents join (elitism='index' or 'count')"
            )
        self.revisit = boolean("revisit", chosen["revisit"])
        self.invert = boolean("invert", invert)
        self.start = initialisation(
            chosen["init"],
            space,
            count=chosen["initial"],
            tokens=self.selection.stages[0].tokens if chosen["initial_tokens"] is None else chosen["initial_tokens"],
            share=initial_share,
            seed=seed,
        )
        self.asks_for_sensitivities = chosen["init"] == "fisher"
        self.paired = PairedAcceptance(doubt, minibatches)
        self.acceptance = one_of("acceptance", acceptance, "loss", "paired")
        against = {
            "elitism": elitism == "none",
            "minibatch": minibatch == "fixed",
            "restart_after": restart_after is not None,
            "survivors": self.selection.population > 1,
        }
        if acceptance == "paired" and any(against.values()):
            change = next(name for name, given in against.items() if given)
            raise InvalidSettingError(
                f"acceptance='paired' compares one parent with one offspring on ever new text: change {change}"
            )
        self.generation = 0
        self.stagnant = 0  # generations since the best parent was last a new one
        self.parents: list[Candidate] = []
        self.champion: Candidate | None = None  # best parent of the starts before this one
        self.tried = Tried()
        self._exact = False  # the problem has no fidelity
        self._noiseless = minibatch == "fixed"  # a loss of the last stage stays what it was

    def fidelities(self) -> tuple[int | None, ...]:
        return tuple(stage.tokens for stage in self.selection.stages)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Inverted, the worst has the least loss from here on."""
        if self.invert:
            outcomes = [o if o.status == "failed" else _inverted(o) for o in outcomes]
        super().tell(outcomes)

    def recommend(self) -> Assignment:
        """The champion of earlier starts, or else the parent; before the first generation, the starting point."""
        if self.champion is not None:
            return self.champion.levels
        return self.parents[0].levels if self.parents else self.start.best()

    def steps(self) -> Steps[None]:
        if not self.allowance.default_tokens:
            self._exact = self._noiseless = True  # a loss stays what it was, and nothing needs a second look
            self.selection = self.selection.in_one_stage()
        yield from self._begin()
        while self.generation < self.generations:
            yield None  # a generation shrinks to what is left to spend
            if self.restart_after is not None and self.stagnant >= self.restart_after:
                self._restart()
            offspring = self._breed()
            if not offspring and not self._asked:
                yield from self._score_the_start()
                continue
            for _ in range(RESTARTS if self.restart_after is not None else 0):
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
        count = self.selection.affordable(self.offspring, paid_again, self.allowance)
        if not count:
            self.stop_reason = "the budget does not pay for another generation"
            return []
        barred = self.tried if self._noiseless and not self.revisit else ()
        wide = self.widen_after is not None and self.stagnant >= self.widen_after
        return self.breeding.breed(count, self.breeders(), {e.levels for e in elders}, barred, wide=wide)

    def breeders(self) -> Sequence[Candidate]:
        """Whose mutants the next offspring are."""
        return self.parents

    def _select_in_stages(self, offspring: list[Candidate]) -> Steps[None]:
        """Scores the offspring in stages of growing fidelity, each on one minibatch, and selects the next parents."""
        draw: Draw = "fixed" if self.minibatch == "fixed" else "fresh"
        last = len(self.selection.stages) - 1
        for number, stage in enumerate(self.selection.stages):
            if not self.selection.needed(len(offspring), number):
                continue
            joining = self._elders() if self.selection.joins(number) else []
            elders = [e for e in joining if not self._remembered(e)]
            if elders and elders[0].number is None:  # a starting point, first scored by the next trial
                offspring = [replace(c, parent=self._asked) if c.parent is None else c for c in offspring]
            # A trial that is stopped early has only a lower bound: no use where the worst are wanted; and a champion
            # must not take the place of the offspring that would be the next parent.
            keep = None if self.invert else stage.survivors + any(e is self.champion for e in elders)
            trials = [self.trial(e.levels, e.parent if e.number is None else e.number, "parent") for e in elders]
            trials += [self.trial(c.levels, c.parent) for c in offspring]
            decides = number == last and self.acceptance == "paired" and not self._noiseless
            terms = Terms(stage.tokens, draw, None if decides else keep, self.generation, number, by_sequence=decides)
            outcomes = yield Batch(tuple(trials), terms)
            if self.minibatch == "nested":
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
            several = len(self.space.groups(self.breeding.group)) > 1 and not self.cross_group
            return "no feasible mutant of the parent exists" + (": cross_group may give some" if several else "")
        advice = ": restart_after would go on from elsewhere" if self.restart_after is None else ""
        return f"no mutant was found that has not been measured{advice}"


def _inverted(outcome: Outcome) -> Outcome:
    parts = outcome.by_sequence
    return replace(outcome, loss=-outcome.loss, by_sequence=None if parts is None else tuple([-x for x in parts]))
