"""EvoPress as an optimizer for an ordinary Nevergrad parametrization, registered as ``EvoPress``.

    import searchers.inside.nevergrad_optimizer                         # registers
    optimizer = nevergrad.optimizers.registry["EvoPress"](parametrization, budget=500)

With a hard budget over integer coordinates:

    ConfiguredEvoPress(costs=[(2, 3, 4)] * 12, cost_budget=36)(parametrization, budget=500)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evo_hpo.errors import InvalidSettingError, InvalidSpaceError
from evo_hpo.search.searcher import boolean, positive, probability
from evo_hpo.space.compression_space import Assignment
from searchers.evopress.mutation import Uniforms
from searchers.foreign.nevergrad_adapter import load
from searchers.inside.breeder import Breeder, budget_space

ng: Any = load()
_Optimizer: Any = ng.optimizers.base.Optimizer
_ConfiguredOptimizer: Any = ng.optimizers.base.ConfiguredOptimizer

STEPS = 1024  # steps of a continuous coordinate
REACH = 5.0  # range of an unbounded coordinate, in its mutation widths on either side of its first value
LEVELS = "evopress_levels"


@dataclass(frozen=True)
class _Leaf:
    """The axes of one parameter: ``grids`` has the values of each coordinate, or the choices' indices."""

    path: tuple[Any, ...]
    grids: tuple[np.ndarray[Any, Any], ...]
    choice: bool

    def read(self, parameter: Any) -> list[int]:
        """Level of each coordinate of the parameter's present value."""
        values = parameter.indices.value if self.choice else np.asarray(parameter.value, float)
        return [int(np.abs(g - v).argmin()) for g, v in zip(self.grids, np.ravel(values), strict=True)]

    def write(self, parameter: Any, levels: Sequence[int]) -> None:
        """Sets the parameter's value from levels."""
        values = [g[k] for g, k in zip(self.grids, levels, strict=True)]
        if self.choice:
            chosen = [parameter.choices[int(v)].value for v in values]
            parameter.value = chosen[0] if parameter._repetitions is None else chosen
            return
        shape = np.shape(parameter.value)
        parameter.value = np.reshape(values, shape) if shape else float(values[0])


def _leaves(parameter: Any, path: tuple[Any, ...] = ()) -> Iterator[_Leaf]:
    """Leaves of a parametrization, in order."""
    if isinstance(parameter, ng.p.Constant):
        return
    if isinstance(parameter, (ng.p.Choice, ng.p.TransitionChoice)):
        if any(not isinstance(c, ng.p.Constant) for c in parameter.choices):
            raise InvalidSpaceError("EvoPress needs choices that are constants, in order: nested parameters have none")
        repeats = 1 if parameter._repetitions is None else parameter._repetitions
        yield _Leaf(path, (np.arange(len(parameter.choices)),) * repeats, choice=True)
    elif isinstance(parameter, (ng.p.Dict, ng.p.Tuple)):
        for key, child in parameter._content.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(parameter, ng.p.Data):
        yield _Leaf(path, tuple(_grids(parameter)), choice=False)
    else:
        raise InvalidSpaceError(f"EvoPress cannot order the values of {type(parameter).__name__}")


def _grids(parameter: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Values of each coordinate of an array or scalar, ascending."""
    value = np.ravel(np.asarray(parameter.value, float))
    reach = REACH * np.broadcast_to(np.ravel(parameter.sigma.value).astype(float), value.shape)
    low, high = (
        value + side * reach if bound is None else np.broadcast_to(np.ravel(bound).astype(float), value.shape)
        for side, bound in zip((-1, 1), parameter.bounds, strict=True)
    )
    logarithmic = isinstance(parameter, ng.p.Log)
    for a, b in zip(low, high, strict=True):
        if parameter.integer:
            yield np.arange(math.ceil(a), math.floor(b) + 1)
        elif logarithmic and a > 0:
            yield np.geomspace(a, b, STEPS + 1)
        else:
            yield np.linspace(a, b, STEPS + 1)


class EvoPressOptimizer(_Optimizer):  # type: ignore[misc]
    """(1 + lambda) evolution with level switches; see :class:`ConfiguredEvoPress` for the settings."""

    def __init__(
        self,
        parametrization: Any,
        budget: int | None = None,
        num_workers: int = 1,
        *,
        costs: Sequence[Sequence[int]] | None = None,
        cost_budget: int | None = None,
        offspring: int = 4,
        max_switches: int = 3,
        cross_group: float = 0.5,
        noisy: bool = False,
    ) -> None:
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        _both_or_neither(costs, cost_budget)
        self._costs, self._cost_budget = costs, cost_budget
        self._offspring = positive("offspring", offspring)
        self._settings: dict[str, Any] = {
            "max_switches": positive("max_switches", max_switches),
            "cross_group": probability("cross_group", cross_group),
        }
        self._noisy = boolean("noisy", noisy)
        self._leaf_list = list(_leaves(self.parametrization))
        self._breeder: Breeder | None = None
        self._stream: Uniforms | None = None
        self._parent: Assignment | None = None
        self._parent_loss = math.inf
        self._generation: list[tuple[float, Assignment]] = []
        self._members: set[Assignment] = set()
        if costs is not None:
            self._make_breeder()  # so that costs which do not fit are an error here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_breeder": None}  # made again where it is needed

    def _make_breeder(self) -> Breeder:
        if self._breeder is None:
            sizes = [len(grid) for leaf in self._leaf_list for grid in leaf.grids]
            space = None
            if self._costs is not None and self._cost_budget is not None:
                if len(self._costs) != len(sizes):
                    raise InvalidSpaceError(f"costs of {len(self._costs)} coordinates given, there are {len(sizes)}")
                named = {f"coordinate {i}": costs for i, costs in enumerate(self._costs)}
                space = budget_space(named, self._cost_budget)
            self._breeder = Breeder(sizes, space, range(len(sizes)) if space else (), **self._settings)
        return self._breeder

    def _levels(self, candidate: Any) -> Assignment:
        found = candidate._meta.get(LEVELS)
        if found is None:
            found = tuple(k for leaf in self._leaf_list for k in leaf.read(_at(candidate, leaf.path)))
        return tuple(found)

    def _internal_ask_candidate(self) -> Any:
        """The first value, then mutants of the parent; in a noisy search the parent again in each generation."""
        breeder = self._make_breeder()
        if self._stream is None:
            self._stream = Uniforms(np.random.default_rng(int(self._rng.randint(2**31))), block=256)
        if self._parent is None:
            levels = self._levels(self.parametrization)
            if breeder.space is not None and not breeder.feasible(levels):
                levels = breeder.space.uniform()
            self._parent = levels
        elif self._noisy and self._parent not in self._members:
            levels = self._parent
        else:
            levels = breeder.child(self._parent, self._stream, self._members.__contains__)
        self._members.add(levels)
        candidate = self.parametrization.spawn_child()
        position = 0
        for leaf in self._leaf_list:
            leaf.write(_at(candidate, leaf.path), levels[position : position + len(leaf.grids)])
            position += len(leaf.grids)
        candidate._meta[LEVELS] = levels
        return candidate

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        """Counts the candidate to the generation; a full generation elects the next parent."""
        levels = self._levels(candidate)
        self._members.add(levels)  # also one that was told without being asked
        breeder = self._make_breeder()
        if not math.isnan(loss) and breeder.feasible(levels):
            self._generation.append((loss, levels))
        else:
            self._generation.append((math.inf, levels))
        if self._parent is None or math.isinf(self._parent_loss):  # nothing better is known yet
            self._elect(close=self._parent is None)
        if len(self._generation) >= self._offspring + (1 if self._noisy else 0):
            self._elect(close=True)

    def _internal_tell_not_asked(self, candidate: Any, loss: float) -> None:
        self._internal_tell_candidate(candidate, loss)

    def _elect(self, close: bool) -> None:
        """The best of the generation becomes the parent, where it is no worse than the parent was."""
        loss, levels = min(self._generation, key=lambda told: told[0])
        if (loss <= self._parent_loss or (self._noisy and close)) and math.isfinite(loss):
            self._parent, self._parent_loss = levels, loss
        if close:
            self._generation = []
            if self._noisy:  # exact losses need no second look
                self._members = set()


def _both_or_neither(costs: object, cost_budget: object) -> None:
    if (costs is None) != (cost_budget is None):
        raise InvalidSettingError("costs and cost_budget go together: give both or neither")


def _at(parameter: Any, path: Sequence[Any]) -> Any:
    for key in path:
        parameter = parameter[key]
    return parameter


class ConfiguredEvoPress(_ConfiguredOptimizer):  # type: ignore[misc]
    """EvoPress with settings, to be called as any of Nevergrad's optimizers.

    Args:
        costs: cost of each value of each coordinate, ascending; coordinates in the order of the parametrization.
        cost_budget: the most that all may cost together; no candidate is ever over it.
        offspring: lambda, candidates of a generation.
        max_switches: an offspring takes min of two draws from 1..max_switches switches.
        cross_group: probability that an offspring exchanges cost across groups of equal steps.
        noisy: the loss is noisy: the parent is scored again in each generation, and only the generation elects; False:
            a candidate is asked for again only where no new one is found.
    """

    def __init__(
        self,
        *,
        costs: Sequence[Sequence[int]] | None = None,
        cost_budget: int | None = None,
        offspring: int = 4,
        max_switches: int = 3,
        cross_group: float = 0.5,
        noisy: bool = False,
    ) -> None:
        _both_or_neither(costs, cost_budget)
        if costs is None:
            super().__init__(EvoPressOptimizer, locals())
            return
        settings = dict(locals())  # costs fit one parametrization only, so the library's trial construction cannot pass
        super().__init__(EvoPressOptimizer, {**settings, "costs": None, "cost_budget": None})
        self.name = f"EvoPress(cost_budget={cost_budget})"
        self._config.update(costs=costs, cost_budget=cost_budget)


EvoPress = ConfiguredEvoPress().set_name("EvoPress", register=True)
