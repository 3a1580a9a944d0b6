"""Gradients first, then measured steps: the additive model within a trust region, told by gradients what to expect."""

from __future__ import annotations

import math

import numpy as np

from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import boolean, positive, probability
from evo_hpo.search.sensitivities import READS
from evo_hpo.search.trial import Outcome, Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.forecast import Forecast
from searchers.additive.informed import InformedModel, expected
from searchers.additive.model import Array, within_reach
from searchers.additive.noise import Noise
from searchers.additive.one_shot import effects_of
from searchers.additive.solvers import solve_many
from searchers.evopress.mutation import Uniforms, mutation, switch_counts

PASS = 2048  # tokens that a pass reads at most
SLOPE_SHARE = 0.6  # of what is left, that one look at the slope may cost
REMOVING = 512  # tokens of such a look at most where units are removed: slopes are steep there, and change with each
BENDS = (1.0, 1 / 1.5, 1.5)  # times what is expected, that a further removal bends the loss: each has its solution
UNMEASURED = 5  # moves there on what slopes say alone, before a race
GROWTH, SHRINKAGE = 1.6, 0.6
SPAN = (1, 0.5, 2, 0.25, 4)  # radii of a batch's solutions, in those of the region
ROUNDS = 6  # of one race, each on twice the tokens of the one before (where units are removed: on as many)
RACE_SHARE = 0.15  # of what is left, that one race may cost
LONGEST = 4096  # tokens of a round at most
LEAST_RACE = 8  # times the tokens of a trial, that a race may cost even so
EVIDENCE = 1.0  # standard errors that end a race
DOUBT = 0.5  # standard errors by which a candidate must be better at its end
BORROWED = 3.0  # sequences' worth of the other candidates' variance


class CurvatureRegion(Procedure):
    """One backward pass tells what to expect of every level, measured steps within a region what becomes of it.

    The curvature at the uncompressed model, from half of the budget or ``first_tokens``, gives a first additive
    model; its exact solutions, whole and within regions around uniform compression, race against uniform compression.
    From the winner the slope of the loss is read, which holds the cross terms between units, and so on: proposals are
    the exact solutions of what is foretold within r/4 to 4r changed units, draws from the posterior, and mutants as
    EvoPress makes them. A race scores them beside the incumbent on minibatch after minibatch, sequence by sequence,
    drops the worse half each time, and moves only to what is better by more than the error of the difference. All rows
    teach the model how far the forecast is to be believed; where they speak against it, no more gradients are bought.

    Where units are only kept or left out, many short passes serve better than measured steps, and the second of them
    looks where others are removed than the first did: no unit shows before it is gone what it was worth. It moves to
    the exact solution of all that slopes have told, as often as that is another one but five times at most, and no
    longer than a further look and a race can be paid. It races then with what it would choose if further removals bent
    the loss as expected, less or more, and with where it was.

    Args:
        tokens: of each minibatch of a race; None: the problem's default.
        first_tokens: that the first pass reads at most; more serve where the budget is large.
        batch: candidates of a race, the incumbent not counted.
        radius: changed units of the first region; None: a tenth of the units, at least 4.
        explore: share of a batch that are posterior draws.
        mutate: share of a batch that are mutants.
        prior: False: no gradients are asked for.
        slopes: False: the only pass is the first one.
        racing: False: one minibatch decides, and any gain is accepted.
        region: False: solutions may change any number of units.
    """

    asks_for_sensitivities = True

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        tokens: int | None = None,
        first_tokens: int = PASS,
        batch: int = 6,
        radius: int | None = None,
        explore: float = 0.3,
        mutate: float = 0.2,
        prior: bool = True,
        slopes: bool = True,
        racing: bool = True,
        region: bool = True,
    ) -> None:
        super().__init__(space, seed=seed)
        self.tokens = tokens if tokens is None else positive("tokens", tokens)
        self.batch, self.first_tokens = positive("batch", batch), positive("first_tokens", first_tokens)
        self.first_radius = max(4, len(space) // 10) if radius is None else positive("radius", radius)
        self.explore, self.mutate = probability("explore", explore), probability("mutate", mutate)
        self.asks_for_sensitivities = self.prior = boolean("prior", prior)
        self.slopes, self.racing, self.region = map(boolean, ("slopes", "racing", "region"), (slopes, racing, region))
        self.incumbent: Assignment = space.uniform()
        self.model = InformedModel(space)
        self.forecast = Forecast(space)
        self._mutation, self._switches = mutation(space, "size", 0.5), switch_counts("min_of_two", 3)
        self._stream = Uniforms(self.rng)
        self._left: list[Assignment] = []  # since it was last measured: where it was, before each move on slopes alone
        self._elsewhere: Assignment | None = None  # the one look at what other units' removal does
        self._apart: dict[Assignment, list[float]] = {}  # differences from the present incumbent
        self._noise = Noise()

    def fidelities(self) -> tuple[int | None, ...]:
        return (self.tokens,)

    def recommend(self) -> Assignment | None:
        """The incumbent; the last one that was measured, while it has moved on slopes alone."""
        return self._left[0] if self._left else self.incumbent

    def steps(self) -> Steps[None]:
        if self.prior and not len(self.forecast) and (tokens := self.pass_tokens(0.5, self.first_tokens)):
            self.forecast.add((yield from self.sensitivities(Probe(None, "sampled", tokens))))
        if len(self.forecast):
            removes = self.forecast.removes  # then uniform compression ruins the model, and tells nothing of others
            most = 1 if removes else self._most()
            yield from self._race(self._solutions(len(self.space))[:most], teaches=not removes)
        self._radius = float(self.first_radius)
        looked: Assignment | None = None
        told = len(self.forecast) > 0
        while True:
            yield None
            if told and not self._alone and not self._trusts():
                told, self._radius = False, self.first_radius / 2
            if told and self.slopes:
                most = max(REMOVING, self._each) if self.forecast.removes else PASS
                tokens = self.pass_tokens(SLOPE_SHARE, most)
                if tokens and (looked != self.incumbent or self._radius < self.first_radius):
                    looked = self.incumbent
                    self.forecast.add((yield from self.sensitivities(Probe(looked, "kl", tokens))))
                    self._radius = max(self._radius, float(self.first_radius))
                    tokens = self.pass_tokens(SLOPE_SHARE, most)
                    if self._alone and not self._elsewhere and tokens and self.forecast.shows:
                        self._elsewhere = self._solved(self.forecast.elsewhere(looked)) or looked
                        if self._elsewhere != looked:
                            self.forecast.add((yield from self.sensitivities(Probe(self._elsewhere, "kl", tokens))))
                    if self._alone and self._moves():
                        continue
            candidates = self._candidates(max(1, round(self._radius)))
            if not candidates:
                self.stop_reason = "no assignment that is new around the incumbent"
                return
            before = self.incumbent
            if (yield from self._race(candidates)):
                self._radius = min(
                    max(GROWTH * self._changed(before), SHRINKAGE * self._radius), float(len(self.space))
                )
            else:
                self._radius = self._radius * SHRINKAGE if self._radius > 2 else float(self.first_radius)

    # ------------------------------------------------------------------ what is bought

    @property
    def _each(self) -> int:
        return self.tokens or self.allowance.default_tokens

    def _trusts(self) -> bool:
        """Whether what was measured speaks for the forecast."""
        if len(self.model):
            if self.forecast.removes:
                self.model.inform(self.forecast.table(self.incumbent))  # which proposals of its own did not need
            self.model.fit(self.incumbent)
        return self.model.trusted

    def pass_tokens(self, share: float, most: int) -> int:
        """Tokens that a pass reads, in whole trials' tokens, on at most this share of what is left; 0: none."""
        left, each = self.allowance, self._each
        if left.evaluations is not None and left.evaluations <= READS + 2:
            return 0
        if left.tokens is not None:
            most = min(most, int(share * left.tokens) // READS)
        return most // max(each, 1) * each if each else 1

    def _purse(self) -> float:
        """Tokens that a race may cost."""
        left = self.allowance.tokens
        return math.inf if left is None else min(left, max(RACE_SHARE * left, LEAST_RACE * self._each))

    def _moves(self) -> bool:
        """Goes to the forecast's solution unmeasured, if it is another one and a race can be paid; not for long."""
        trials = 1 if self.allowance.tokens is None else max(REMOVING // (self._each or 1), 1)  # that a look reads
        needed = READS * trials + 3  # a look from there and a race
        if len(self._left) == UNMEASURED or self.allowance.affords(needed, self._each or None) < needed:
            return False
        found = self._solved(self.forecast.table(self.incumbent))
        if found is None or found == self.incumbent:
            return False
        self._left.append(self.incumbent)
        self.incumbent = found
        self._apart.clear()
        return True

    def _solved(self, table: Array) -> Assignment | None:
        """What loses least by a table of losses that is seen from the incumbent."""
        return solve_many(self.space, [effects_of(self.space, table)], start=self.incumbent)[0]

    def _most(self) -> int:
        """Candidates of a race: the batch, or what a third of the rest pays for once; alone 2 to 4, for half of it."""
        if self._alone:
            return max(2, self.allowance.affords(8, self._each or None) // 2)
        return max(2, self.allowance.affords(3 * (1 + self.batch), self._each or None) // 3 - 1)

    # ------------------------------------------------------------------ what is proposed

    def _candidates(self, radius: int) -> list[Assignment]:
        """Solutions, draws, mutants (where few: only for want); after unmeasured moves, the last place among them."""
        most = self._most()
        mutants = 0 if self._alone else round(self.mutate * most)
        new = self._solutions(radius) if len(self.forecast) or len(self.model) else []
        bends = [a for a in dict.fromkeys(self._bends()) if a != self.incumbent][: most - bool(self._left)]
        found = dict.fromkeys([*bends, *self._left[::-1], *new])
        chosen = [a for a in found if a != self.incumbent and not self._is_worse(a)][: most - mutants]
        for _ in range(50 * most):
            if len(chosen) >= (1 if self._alone else most):
                break
            made = self._mutation(self.incumbent, self._stream, self._switches(self._stream))
            if made is not None and made not in (self.incumbent, *chosen) and made not in self._apart:
                chosen.append(made)
        return chosen

    def _bends(self) -> list[Assignment]:
        """Solutions of the forecast alone, as expected and where further removals bend the loss less or more."""
        tables = [self.forecast.table(self.incumbent, away=away) for away in BENDS] if self._alone else []
        return [found for table in tables if (found := self._solved(table))]

    def _is_worse(self, levels: Assignment) -> bool:
        """Whether it was measured and is not better than the incumbent."""
        return levels in self._apart and (not self._fidelity or self._mean(levels) > -self._error(levels))

    def _solutions(self, radius: int) -> list[Assignment]:
        """Exact solutions around the incumbent, of the mean within r/4 to 4r, and of draws within r."""
        centre = self.incumbent
        alone = self._alone
        mean = self._foretold() if alone else expected(self.forecast, self.model, centre)
        count = round(self.explore * self.batch) if alone or len(self.model) else 0
        draws = [self._foretold(self.rng) if alone else self.model.effects(self.rng) for _ in range(count)]
        radii = [max(1, round(radius * by)) for by in SPAN] if self.region else [len(self.space)]
        reach = None if len(self.forecast) and self.model.trusted else 1
        proposals = [
            solve_many(self.space, [within_reach(mean, centre, reach)], start=centre, changes=self._limit(r))[0]
            for r in dict.fromkeys(radii)
        ]
        if draws:
            effects = [within_reach(e, centre, reach) for e in draws]
            proposals += solve_many(self.space, effects, start=centre, changes=self._limit(radius))
        return [a for a in dict.fromkeys(proposals) if a is not None and a != centre]

    @property
    def _alone(self) -> bool:
        """Whether the forecast is believed without rows: where one removed unit can ruin a model, few rows mislead."""
        return self.forecast.removes and len(self.forecast) > 0 and len(self.model) < len(self.space)

    def _foretold(self, rng: np.random.Generator | None = None) -> list[list[float]]:
        """Loss of every unit's levels, seen from the incumbent, by the forecast alone; with ``rng``, a draw of it."""
        return effects_of(self.space, self.forecast.table(self.incumbent, rng))

    def _limit(self, radius: int) -> int | None:
        return radius if radius < len(self.space) else None

    # ------------------------------------------------------------------ what is measured

    def _race(self, candidates: list[Assignment], *, teaches: bool = True) -> Steps[bool]:
        """Scores candidates beside the incumbent until one is better beyond doubt or none may be; True: it moved in.

        Without ``teaches`` neither the model nor what is known of the noise learns from it.
        """
        running, cost, read, purse = candidates, 0, 0, self._purse()
        for number in range(ROUNDS if self.racing else 1):
            tokens = self._each if self._alone else min(self._each * 2**number, self._longest)
            sent = [self.incumbent, *running]
            cost += tokens * len(sent)
            if number and (cost > purse or 0 < self.allowance.pool_tokens == read):  # or all text is read
                break
            read = tokens
            outcomes: list[Outcome] = yield self.propose(
                sent, tokens=tokens or None, draw="fresh", stage=number, by_sequence=True
            )
            self.remember(outcomes)
            self._learn(outcomes, teaches)
            running = sorted((a for a in running if a in self._apart), key=self._mean)
            if not running or len(outcomes) < len(sent):
                break
            clear = self._mean(running[0]) / self._error(running[0]) if self._fidelity else math.inf
            if clear > EVIDENCE or (clear < -EVIDENCE and self._leads(running)):
                break
            running = running[: max(1, len(running) // 2)]
        if outcomes and not outcomes[0].usable:
            return self._leaves(outcomes)
        self._left.clear()
        doubt = DOUBT if self.racing and self._fidelity and not self._alone else 0.0
        if not running or self._mean(running[0]) >= -doubt * self._error(running[0]):
            return False
        self.incumbent = running[0]
        self._apart.clear()
        return True

    def _leaves(self, outcomes: list[Outcome]) -> bool:
        """From an incumbent that cannot be used to the last that was measured, or else the best of the race, if any."""
        best = [o.trial.levels for o in sorted(outcomes, key=lambda o: o.loss) if o.usable]
        before, self.incumbent = self.incumbent, (*self._left, *best, self.incumbent)[0]
        self._left.clear()
        if moved := self.incumbent != before:
            self._apart.clear()
        return moved

    @property
    def _longest(self) -> int:
        """Tokens of the longest minibatch, whole minibatches of the first round."""
        longest = min(LONGEST, self.allowance.pool_tokens or LONGEST)
        return max(self._each, longest // max(self._each, 1) * self._each)

    def _leads(self, running: list[Assignment]) -> bool:
        """Whether the first is twice as much better than the incumbent as the second."""
        return len(running) == 1 or self._mean(running[0]) < 2 * self._mean(running[1])

    @property
    def _fidelity(self) -> bool:
        return self.allowance.default_tokens > 0

    def _learn(self, outcomes: list[Outcome], teaches: bool) -> None:
        """Adds what was measured to the differences from the incumbent, and, if it teaches, to the model's rows."""
        reference = outcomes[0]
        if not reference.usable:
            return
        for outcome in outcomes[1:]:
            if not outcome.usable:
                self._apart.setdefault(outcome.trial.levels, []).append(math.inf)
                continue
            if reference.by_sequence and outcome.by_sequence:
                found = np.subtract(outcome.by_sequence, reference.by_sequence).tolist()
            else:
                found = [outcome.loss - reference.loss]
            self._apart.setdefault(outcome.trial.levels, []).extend(found)
            if not teaches:
                continue
            self._noise.learn(found, self._changed(outcome.trial.levels))
            weight = outcome.tokens / self._each if self._each else 1.0
            self.model.add(outcome.trial.levels, self.incumbent, outcome.loss - reference.loss, weight)

    def _mean(self, levels: Assignment) -> float:
        return float(np.mean(self._apart[levels]))

    def _error(self, levels: Assignment) -> float:
        """Standard error of the mean difference; few differences borrow their variance from all that were measured."""
        own = self._apart[levels]
        squares = float(np.var(own)) * len(own) if math.isfinite(sum(own)) else 0.0
        variance = (squares + BORROWED * self._noise.variance * self._changed(levels)) / (len(own) - 1 + BORROWED)
        return math.sqrt(variance / len(own)) or 1e-12

    def _changed(self, levels: Assignment) -> int:
        return sum(a != b for a, b in zip(levels, self.incumbent, strict=True))
