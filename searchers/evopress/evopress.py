"""EvoPress: a (mu + lambda) evolutionary search with level-switch mutation and multi-step selection.

Sieberling, Kuznedelev, Kurtic, Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025 (arXiv 2410.14649), algorithm 1. Where this differs from the published search, a setting says so and switches it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, boolean, positive, probability
from evo_hpo.search.trial import Draw, Outcome, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.initialisation import WARM_STARTS, Initialisation, WarmStart, initialisation, random_and_spent
from searchers.evopress.mutation import SwitchCount, Uniforms, heavy_tailed, mutation, switch_counts
from searchers.evopress.presets import PRESETS, most_generations, resolved
from searchers.evopress.selection import Selection, rank

__all__ = ["PRESETS", "EvoPress"]


PATIENCE = 100_000  # draws in vain of one generation, whatever the number of offspring
PERSISTENCE = 1000  # draws of any number of switches before the search gives up
RESTARTS = 20  # new starts in a row, each without a mutant to measure, before the search gives up


@dataclass(frozen=True, slots=True)
class _Candidate:
    levels: Assignment
    parent: int | None = None
    number: int | None = None
    loss: float | None = None  # of a parent: exact, on the last stage's data, times the sign; None: not known


class EvoPress(Searcher):
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
            recommends after ``initial_share`` of the budget: ``dynamic_programming``, ``trust_region``.
        initial: starting points drawn, of which the best on ``initial_tokens`` is taken.
        initial_tokens: calibration tokens of a starting point; None: the first stage's.
        initial_share: share of the budget for a start by another searcher; its trials are charged like all others.
        elitism: parents join the last stage by ``index``, stages by survivor ``count`` (reference), or ``none``.
        minibatch: ``fresh`` for every stage; ``nested`` (a stage's data contains the one before's); ``fixed``.
        widen_after: generations without a new best parent after which the number of switches has a heavy tail (power
            law) until there is one; None: never.
        restart_after: generations without a new best parent after which the search starts anew, or sooner where no
            mutant is left to measure; None: never.
        revisit: let an offspring be an assignment measured before, as published; False (``plain``): not where its loss
            is exact (a problem without fidelity, or ``minibatch="fixed"``) and would only be read once more.
        invert: look for the worst assignment instead.
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
        self.switches = switch_counts(switch_rule, positive("max_switches", max_switches))
        self.far_switches = heavy_tailed(len(space))
        self.cross_group = probability("cross_group", chosen["cross_group"])
        self.mutate = mutation(space, group, self.cross_group)
        self.group = group
        if minibatch not in ("fresh", "nested", "fixed"):
            raise InvalidSettingError(f"minibatch={minibatch!r} must be one of: fresh, nested, fixed")
        self.minibatch = minibatch
        self.widen_after = None if widen_after is None else positive("widen_after", widen_after)
        self.restart_after = None if restart_after is None else positive("restart_after", restart_after)
        if elitism == "none" and not (widen_after is None and restart_after is None):
            raise InvalidSettingError(
                "widen_after and restart_after wait for generations without a new best parent; elitism='none' makes "
                "a new parent of each: leave them out, or let parents join (elitism='index' or 'count')"
            )
        self.revisit = boolean("revisit", chosen["revisit"])
        self.sign = -1.0 if boolean("invert", invert) else 1.0
        self.stream = Uniforms(self.rng)
        self.generation = 0
        self.stagnant = 0
        if not 0 < probability("initial_share", initial_share) < 1:
            raise InvalidSettingError(
                f"initial_share={initial_share!r} must be a share of the budget, above 0, below 1"
            )
        start_tokens = self.selection.stages[0].tokens
        if chosen["initial_tokens"] is not None:
            start_tokens = positive("initial_tokens", chosen["initial_tokens"])
        self.warm: WarmStart | None = None
        self.start: Initialisation | None = None
        if chosen["init"] in WARM_STARTS:
            self.warm = WarmStart(chosen["init"], space, tokens=start_tokens, share=initial_share, seed=seed)
        else:
            count = positive("initial", chosen["initial"])
            self.start = initialisation(chosen["init"], space, count=count, tokens=start_tokens, seed=seed)
        self.parents: list[_Candidate] = []
        self.champion: _Candidate | None = None
        self._stage = 0
        self._nested = False  # a stage of this generation was asked before, whose minibatch the next one contains
        self._candidates: list[_Candidate] = []
        self._pending: list[_Candidate] = []
        self._exact = False  # the problem has no fidelity
        # First trial and exact loss (on the last stage's data, times the sign) of each assignment; no loss: it failed.
        self._measured: dict[Assignment, tuple[int | None, float | None]] = {}
        self._noiseless = minibatch == "fixed"

    # ------------------------------------------------------------------ ask

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """The next stage: of the initialisation, of this generation, or the first of a new generation."""
        if not allowance.default_tokens and not self._exact:
            self._exact = self._noiseless = True  # a loss stays what it was, and nothing needs a second look
            self.selection = self.selection.in_one_stage()
        if self.warm is not None:
            trials = self.warm.ask(allowance)
            if trials:
                return trials
            self._asked = self.warm.asked
            self.parents = [self._candidate(self.warm.best(), self.warm.best_number)]
            self.warm = None
        if self.start is not None:
            points = self.start.ask(allowance)
            if points:
                self._pending = [_Candidate(p) for p in points]
                return tuple(
                    self.trial(p, tokens=self.start.tokens, minibatch="fixed", note=self.start.note) for p in points
                )
            self._begin(allowance.default_tokens)
        if not self._candidates:
            if self.generation >= self.generations:
                self.stop_reason = f"all {self.generation} generations are done"
                return ()
            if self.restart_after is not None and self.stagnant >= self.restart_after:
                self._restart()
            self._candidates = self._affordable_mutants(allowance)
            if not self._candidates and not self._asked:
                return self._ask_parent()
            for _ in range(RESTARTS if self.restart_after is not None else 0):
                if self._candidates or self.stop_reason:
                    break
                self._restart()
                self._candidates = self._affordable_mutants(allowance)
            if not self._candidates:
                self.stop_reason = self.stop_reason or self._why_none()
                return ()
            self.generation += 1
            self._stage = 0
            self._nested = False
        while not self.selection.needed(len(self._candidates), self._stage):
            self._stage += 1
        return self._ask_stage()

    def _ask_stage(self) -> tuple[Trial, ...]:
        stage = self.selection.stages[self._stage]
        elders = [e for e in self._elders() if not self._remembered(e)] if self.selection.joins(self._stage) else []
        if elders and elders[0].number is None:  # a starting point, first scored by the next trial
            self._candidates = [replace(c, parent=self._asked) if c.parent is None else c for c in self._candidates]
        candidates = [*elders, *self._candidates]
        self._pending = candidates
        # A trial that is stopped early has only a lower bound: no use where the worst are wanted; and a champion must
        # not take the place of the offspring that would be the next parent.
        keep = None if self.sign < 0 else stage.survivors + any(e is self.champion for e in elders)
        rule: Draw = "fixed" if self.minibatch == "fixed" else "fresh"
        if self.minibatch == "nested" and self._nested:
            rule = "same"
        self._nested = True
        return tuple(
            self.trial(
                c.levels,
                tokens=stage.tokens,
                generation=self.generation,
                stage=self._stage,
                parent=c.parent if c.number is None else c.number,
                minibatch=rule,
                keep=keep,
                note="parent" if i < len(elders) else "",
            )
            for i, c in enumerate(candidates)
        )

    def _ask_parent(self) -> tuple[Trial, ...]:
        """A start without a mutant, or with none that the budget pays, is scored: it is what the search recommends."""
        self.stop_reason = ""
        self._stage = len(self.selection.stages) - 1
        self._pending = self.parents
        tokens = self.selection.stages[-1].tokens
        return (self.trial(self.parents[0].levels, tokens=tokens, stage=self._stage, minibatch="fixed", note="parent"),)

    def _elders(self) -> list[_Candidate]:
        return [*self.parents, *([self.champion] if self.champion else [])]

    def _remembered(self, elder: _Candidate) -> bool:
        return self._noiseless and elder.loss is not None

    def _joining(self) -> int:
        """Parents (and champion) that have to be paid for in the last stage."""
        return sum(not self._remembered(e) for e in self._elders())

    def _affordable_mutants(self, allowance: Allowance) -> list[_Candidate]:
        count = self.selection.affordable(self.offspring, self._joining(), allowance)
        if not count:
            self.stop_reason = "the budget does not pay for another generation"
            return []
        return self._breed(count)

    def _why_none(self) -> str:
        exist = any(True for p in self.parents for _ in self.space.switches(p.levels, self.group))
        if not exist and not self.generation:
            several = len(self.space.groups(self.group)) > 1 and not self.cross_group
            return "no feasible mutant of the parent exists" + (": cross_group may give some" if several else "")
        advice = ": restart_after would go on from elsewhere" if self.restart_after is None else ""
        return f"no mutant was found that has not been measured{advice}"

    def _breed(self, count: int) -> list[_Candidate]:
        """Up to ``count`` distinct mutants, none equal to a parent or champion; fewer where fewer are found.

        Where losses are exact, none is measured twice: around a local optimum the neighbours run out, and the search
        looks further away instead of at the same ones.
        """
        seen = {e.levels for e in self._elders()}
        wide = self.widen_after is not None and self.stagnant >= self.widen_after
        usual = self.far_switches if wide else self.switches
        return (
            self._draw(count, usual, seen, min(50 + 10 * count, PATIENCE))
            or self._neighbours(count, seen)
            or self._draw(count, lambda stream: 1 + stream.below(len(self.space)), seen, PERSISTENCE)
        )

    def _barred(self) -> Collection[Assignment]:
        """Assignments that no offspring may be again."""
        return self._measured if self._noiseless and not self.revisit else ()

    def _draw(self, count: int, switches: SwitchCount, seen: set[Assignment], patience: int) -> list[_Candidate]:
        """Up to ``count`` random mutants, which join ``seen``; gives up after ``patience`` draws in vain."""
        found: list[_Candidate] = []
        old = self._barred()
        failures = 0
        while len(found) < count and failures < patience:
            parent = self.parents[self.stream.below(len(self.parents)) if len(self.parents) > 1 else 0]
            levels = self.mutate(parent.levels, self.stream, switches(self.stream))
            if levels is not None:
                before = len(seen)
                seen.add(levels)  # hashing a long tuple is what a draw costs, so it is added and looked up at once
                if len(seen) > before and levels not in old:
                    found.append(_Candidate(levels, parent.number))
                    continue
            failures += 1
        return found

    def _neighbours(self, count: int, seen: set[Assignment]) -> list[_Candidate]:
        """Up to ``count`` of the parents' unseen neighbours, at random: chance may have missed a lone one."""
        old = self._barred()
        left = {
            levels: _Candidate(levels, parent.number)
            for parent in self.parents
            for levels in self.space.switches(parent.levels, self.group)
            if levels not in seen and levels not in old
        }
        able = list(left.values())
        return [able.pop(self.stream.below(len(able))) for _ in range(min(count, len(able)))]

    # ------------------------------------------------------------------ tell

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Selects the survivors of the stage that was asked."""
        if self.warm is not None:
            self.warm.tell(outcomes, self.sign)
            self._remember(outcomes, self._exact)
            return
        if self.start is not None:
            self.start.tell(outcomes, self.sign)
            self._remember(outcomes, self._exact)
            return
        last = self._stage == len(self.selection.stages) - 1
        self._remember(outcomes, self._noiseless and last)
        scored = sorted(zip(outcomes, self._pending, strict=False), key=lambda pair: rank(pair[0], self.sign))
        if last:
            self._select([(o, c) for o, c in scored if o.usable])
            self._candidates = []
            return
        # Parents that compete may take the place of offspring here, as published; a champion of an earlier start not.
        rivals = [c for o, c in scored if o.status != "failed" and c is not self.champion]
        parents = {id(p) for p in self.parents}
        survivors = rivals[: self.selection.stages[self._stage].survivors]
        self._candidates = [c for c in survivors if id(c) not in parents]
        self._stage += 1
        if not self._candidates:
            self.stagnant += 1

    def _remember(self, outcomes: Sequence[Outcome], exact: bool) -> None:
        """Keeps exact losses, and that an assignment was tried at all."""
        if not exact:
            return
        for outcome in outcomes:
            loss = self.sign * outcome.loss if outcome.usable else None
            number, known = self._measured.setdefault(outcome.trial.levels, (outcome.trial.number, loss))
            if loss is not None and loss != known:
                self._measured[outcome.trial.levels] = (number, loss)

    def _candidate(self, levels: Assignment, number: int | None = None) -> _Candidate:
        """With what is known of it."""
        first, loss = self._measured.get(levels, (None, None))
        return _Candidate(levels, number=first if number is None else number, loss=loss)

    def _select(self, best: list[tuple[Outcome, _Candidate]]) -> None:
        """The next parents from the outcomes of the last stage, best first."""
        losses = [(self.sign * outcome.loss, candidate) for outcome, candidate in best]
        numbers = {id(candidate): outcome.trial.number for outcome, candidate in best}
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

    def _against(self, champion: _Candidate, losses: list[tuple[float, _Candidate]]) -> list[tuple[float, _Candidate]]:
        """All but the champion, which is one no longer where another is better; the parent where there is no other."""
        others = [(loss, c) for loss, c in losses if c.levels != champion.levels]
        own = next((loss for loss, c in losses if c.levels == champion.levels), champion.loss)
        mark = math.inf if own is None else own
        if others and min(loss for loss, _ in others) < mark:
            self.champion = None
        elif self._noiseless and own is not None:
            self.champion = replace(champion, loss=own)
        return others or [(math.inf, self.parents[0])]

    # ------------------------------------------------------------------ starts

    def _begin(self, default_tokens: int) -> None:
        """The best starting point becomes the parent; its loss counts where it is of the last stage's fidelity."""
        assert self.start is not None
        levels, loss = self.start.best(), self.start.best_loss
        fidelities = {default_tokens if t is None else t for t in (self.start.tokens, self.selection.stages[-1].tokens)}
        if self._noiseless and loss is not None and (len(fidelities) == 1 or not default_tokens):
            self._measured[levels] = (self.start.best_number, loss)
        self.parents = [self._candidate(levels, self.start.best_number)]
        self.start = None

    def _restart(self) -> None:
        """Keeps the parent as champion and goes on from a random assignment that spends the budget."""
        if self.champion is None:
            self.champion = self.parents[0]
        levels = random_and_spent(self.space, self.rng)
        self.parents = [self._candidate(levels)]
        self.stagnant = 0

    def recommend(self) -> Assignment:
        """The champion of earlier starts, or else the parent; before the first generation, the starting point."""
        if self.champion is not None:
            return self.champion.levels
        if self.parents:
            return self.parents[0].levels
        start = self.warm or self.start
        return start.best() if start is not None else self.space.uniform()
