"""EvoPress as a sampler for an ordinary Optuna study: storage, ``n_jobs``, ask-and-tell and dashboards all work.

    sampler = EvoPressSampler(costs={"layer0": [2, 3, 4], "layer1": [2, 3, 4]}, budget=6, seed=0)
    study = optuna.create_study(sampler=sampler)

The sampler keeps no state of its own: generations are marked on the study's trials, so several processes can share a
study, and a stopped one goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evo_hpo.errors import InvalidSettingError, InvalidSpaceError, MissingPackageError
from evo_hpo.search.searcher import boolean, positive, probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.mutation import Uniforms
from searchers.inside.breeder import Breeder, budget_space

try:
    import optuna
except ImportError as error:
    raise MissingPackageError("EvoPressSampler needs the package optuna: pip install 'optuna>=5,<6'") from error

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from optuna.search_space import IntersectionSearchSpace

GENERATION = "evopress:generation"
STEPS = 1024  # steps of a continuous parameter


class _Axis:
    """A parameter's values in order, as level indices."""

    def __init__(self, distribution: BaseDistribution) -> None:
        self.distribution = distribution
        if isinstance(distribution, CategoricalDistribution):
            self.size = len(distribution.choices)
        elif isinstance(distribution, (IntDistribution, FloatDistribution)):
            step = distribution.step
            span = distribution.high - distribution.low
            self.size = STEPS + 1 if step is None and span else 1 if not span else round(span / (step or 1)) + 1
        else:
            raise InvalidSpaceError(f"distribution {distribution!r} has no order of values")

    def value(self, level: int) -> Any:
        """The value of a level, in the distribution's own type."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return d.choices[level]
        assert isinstance(d, (IntDistribution, FloatDistribution))
        if isinstance(d, IntDistribution):
            return int(d.low + level * d.step)
        if d.step is not None:
            return float(min(d.low + level * d.step, d.high))
        share = level / max(self.size - 1, 1)
        if d.log:
            return float(min(max(math.exp(math.log(d.low) + share * math.log(d.high / d.low)), d.low), d.high))
        return float(min(d.low + share * (d.high - d.low), d.high))

    def level(self, value: Any) -> int:
        """The level nearest to a value."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return int(d.to_internal_repr(value))
        assert isinstance(d, (IntDistribution, FloatDistribution))
        if self.size == 1:
            return 0
        if d.step is not None:
            position = (float(value) - d.low) / d.step
        elif d.log:
            position = math.log(float(value) / d.low) / math.log(d.high / d.low) * (self.size - 1)
        else:
            position = (float(value) - d.low) / (d.high - d.low) * (self.size - 1)
        return min(max(round(position), 0), self.size - 1)


class EvoPressSampler(BaseSampler):
    """(1 + lambda) evolution with level switches, for one objective.

    Integer parameters, stepped floats, and categorical ones whose choices are in order are searched by single steps;
    continuous ones on a grid of 1024 steps.

    Args:
        costs: cost of each value of each parameter that shares the budget, values ascending; None: no budget.
        budget: the most that those parameters may cost together; no proposed trial is ever over it (values that
            ``enqueue_trial`` or ``PartialFixedSampler`` fix are not the sampler's to change).
        floor: the least that they must cost.
        groups: parameters of one group exchange steps with each other; default: those of equal cost steps.
        offspring: lambda, trials of a generation.
        max_switches: an offspring takes min of two draws from 1..max_switches switches.
        cross_group: probability that an offspring exchanges budget across groups.
        noisy: the objective is noisy: the parent is scored again in each generation, and the next parent is the best
            of that generation alone (where all of it failed, of the last one that did not); False: the next parent is
            the best of all, and an assignment is tried again only where no new one is found.
        seed: of the random stream; each trial has its own, by number, so ``n_jobs`` changes no draw.

    Raises:
        InvalidSettingError: costs without a budget or the reverse, or a number out of range.
        InfeasibleError: no assignment meets the budget.
    """

    def __init__(
        self,
        *,
        costs: Mapping[str, Sequence[int]] | None = None,
        budget: int | None = None,
        floor: int = 0,
        groups: Mapping[str, str] | None = None,
        offspring: int = 4,
        max_switches: int = 3,
        cross_group: float = 0.5,
        noisy: bool = False,
        seed: int | None = None,
    ) -> None:
        if (costs is None) != (budget is None):
            raise InvalidSettingError("costs and budget go together: give both or neither")
        self._space = (
            None if costs is None or budget is None else budget_space(costs, budget, floor=floor, groups=groups)
        )
        if unknown := set(groups or {}) - set(costs or {}):
            raise InvalidSettingError(f"groups names {', '.join(sorted(unknown))}: only parameters with costs have one")
        self._offspring = positive("offspring", offspring)
        self._max_switches = positive("max_switches", max_switches)
        self._cross_group = probability("cross_group", cross_group)
        self._noisy = boolean("noisy", noisy)
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._intersection: IntersectionSearchSpace = optuna.search_space.IntersectionSearchSpace()
        self._last_start: tuple[int, Assignment] = (-1, ())
        self._breeders: dict[tuple[tuple[str, int], ...], Breeder] = {}
        self._reserve = () if self._space is None else self._space.uniform()  # kept for parameters that are not bred
        self._bred: set[int] = set()  # running trials whose common parameters have the budget but for a reserve

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is made anew where it is needed; so a sampler that was used can be pickled."""
        return {**self.__dict__, "_breeders": {}}

    def reseed_rng(self) -> None:
        """Nothing to do: every trial has a stream of its own number."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._intersection.calculate(study)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """An offspring of the best trial, or the parent again where a noisy generation begins."""
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        axes = {name: _Axis(d) for name, d in search_space.items()}
        self._bred.add(trial.number)
        breeder = self._breeder(axes)
        stream = self._stream(trial)
        generation, members, parent = self._generation(study, axes, breeder)
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, generation)
        if parent is None:
            levels = breeder.random(stream, np.random.default_rng([self._seed, trial.number, 2]))
        elif self._noisy and not any(m == parent for m in members):
            levels = parent
        else:
            levels = breeder.child(parent, stream, self._taken(study, axes, members))
        return {name: axis.value(level) for (name, axis), level in zip(axes.items(), levels, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is not in the common space: the budget's start, or a uniform draw where it has no cost.

        Beside parameters that were bred it is its level in uniform compression, which was kept in reserve for it.
        """
        self._raise_error_if_multi_objective(study)
        axis = _Axis(param_distribution)
        if self._space is not None:
            names = [u.name for u in self._space.units]
            if param_name in names:
                index = names.index(param_name)
                if len(self._space.units[index].costs) != axis.size:
                    raise InvalidSpaceError(
                        f"parameter {param_name!r} has {axis.size} values, "
                        f"costs are given for {len(self._space.units[index].costs)}"
                    )
                start = self._reserve if trial.number in self._bred else self._start(trial)
                return axis.value(start[index])
        name = param_name.encode()
        label = int.from_bytes(name if len(name) <= 64 else hashlib.sha512(name).digest(), "little")
        rng = np.random.default_rng([self._seed, trial.number, 1, label])
        return axis.value(int(rng.integers(axis.size)))

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Forgets the trial: the study keeps all that is needed."""
        self._bred.discard(trial.number)

    def _stream(self, trial: FrozenTrial) -> Uniforms:
        return Uniforms(np.random.default_rng([self._seed, trial.number]), block=256)

    def _start(self, trial: FrozenTrial) -> Assignment:
        """Uniform compression for the study's first trial; a random assignment for those that run beside it."""
        assert self._space is not None
        number, levels = self._last_start  # asked for once a parameter
        if number != trial.number:
            rng = np.random.default_rng([self._seed, trial.number, 2])
            levels = self._space.sample(rng) if trial.number else self._space.uniform()
            self._last_start = trial.number, levels
        return levels

    def _breeder(self, axes: Mapping[str, _Axis]) -> Breeder:
        key = tuple((name, axis.size) for name, axis in axes.items())
        if key not in self._breeders:
            names = list(axes)
            space, members = None, []
            if self._space is not None:
                missing = [u.name for u in self._space.units if u.name not in axes]
                space = _without(self._space, set(missing)) if missing else self._space
                members = [names.index(u.name) for u in space.units] if space is not None else []
            self._breeders[key] = Breeder(
                [a.size for a in axes.values()],
                space,
                members,
                max_switches=self._max_switches,
                cross_group=self._cross_group,
            )
        return self._breeders[key]

    def _taken(self, study: Study, axes: Mapping[str, _Axis], members: set[Assignment]) -> Callable[[Assignment], bool]:
        """Whether the generation has an assignment already; where losses are exact, whether the study has."""
        if self._noisy:
            return members.__contains__
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        params = (t.params for t in study.get_trials(deepcopy=False, states=states))
        known = {tuple(p[name] for name in axes) for p in params if p.keys() == axes.keys()}

        def taken(levels: Assignment) -> bool:
            values = tuple(axis.value(level) for axis, level in zip(axes.values(), levels, strict=True))
            return levels in members or values in known

        return taken

    def _generation(
        self, study: Study, axes: Mapping[str, _Axis], breeder: Breeder
    ) -> tuple[int, set[Assignment], Assignment | None]:
        """The generation to breed for, the assignments it has already, and its parent."""
        states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING)
        trials = study.get_trials(deepcopy=False, states=states)
        marks = [(t, t.system_attrs.get(GENERATION, -1)) for t in trials]
        latest = max((g for _, g in marks), default=-1)
        done = sum(1 for t, g in marks if g == latest and t.state.is_finished())
        wanted = self._offspring + (1 if self._noisy and latest > 0 else 0)
        generation = 0 if latest < 0 else latest + 1 if done >= wanted else latest
        known = axes.keys()

        def levels(t: FrozenTrial) -> Assignment:
            return tuple(axis.level(t.params[name]) for name, axis in axes.items())

        members = {levels(t) for t, g in marks if g == generation and known <= t.params.keys()}
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        elders = [
            (-g if self._noisy else 0, sign * t.value, -t.number, t)  # noisy: only the last generation that has one
            for t, g in marks
            if g < generation and t.state == TrialState.COMPLETE and t.value is not None
        ]
        for *_, t in sorted(elders, key=lambda e: e[:3]):
            if known <= t.params.keys() and breeder.feasible(levels(t)):
                return generation, members, levels(t)
        return generation, members, None


def _without(space: CompressionSpace, missing: set[str]) -> CompressionSpace | None:
    """The budget over the parameters that the study has, less what uniform compression pays for the others, or None."""
    units = [u for u in space.units if u.name not in missing]
    pairs = zip(space.units, space.vectors, space.uniform(), strict=True)
    reserve = sum(costs[level][0] for unit, costs, level in pairs if unit.name in missing)
    return CompressionSpace(units, space.budget - reserve, floor=max(space.floor - reserve, 0)) if units else None
