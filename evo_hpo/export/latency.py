"""Measuring a :class:`LatencyTable`: single products and whole models in one program, in turns, on this machine.

Other programs on the machine slow everything down, some seconds more than others. So products and whole models take
turns, and of each the shortest time counts. What a whole model takes beyond its products is attention,
norms, embedding and head, and what the program does between products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.scoring.footprint import ModelShape, configuration
from evo_hpo.scoring.latency_table import LatencyTable, Layer, agreement, check_blocks, layer_of, sizes_of, takes_time
from evo_hpo.space.compression_space import Assignment

RUNS = 3
"""A turn of a product or a model; the first finds the last one's data in the cache and does not count."""

READ = 128 << 20
"""Bytes that the products of one layer read a run, unless the model has less: more than a processor's cache holds."""


class Timer(Protocol):
    """What can be run again and again."""

    def nanoseconds(self) -> float:
        """Of one run."""


class Program(Protocol):
    """A program that runs a model; what it makes is kept until its context ends."""

    name: str
    version: str

    def product(self, choice: Choice, read: int) -> contextlib.AbstractContextManager[Timer]:
        """One layer at one level with one token; a run reads at least so many bytes of such layers, one by one."""

    def model(self, levels: LevelSet, assignment: Assignment, depth: int) -> contextlib.AbstractContextManager[Timer]:
        """The whole model at an assignment, decoding one token after `depth` others."""


def layers_of(levels: LevelSet, program: str = "") -> dict[Layer, Choice]:
    """The distinct layers of a set of levels that a program runs; see :func:`takes_time`.

    Raises:
        InvalidSettingError: there are experts, of which a token sees some only.
    """
    check_blocks(levels)
    found: dict[Layer, Choice] = {}
    for name, choices in levels.rows():
        if ".experts." in name:
            raise InvalidSettingError(f"{name!r}: the time of experts is not measured, a token sees some of them only")
        for choice in (choice for level in choices for choice in level):
            if takes_time(choice, program):
                found.setdefault(layer_of(choice), choice)
    return found


def random_profiles(levels: LevelSet, count: int, seed: int = 0) -> list[Assignment]:
    """Assignments from nearly the cheapest to nearly the dearest: each unit's level is binomial, its share rises."""
    rng, units = np.random.default_rng(seed), levels.units
    shares = (np.arange(count) + 0.5) / max(count, 1)
    return [tuple(int(rng.binomial(len(unit.costs) - 1, share)) for unit in units) for share in shares]


def references(levels: LevelSet) -> list[Assignment]:
    """Each level that all units have, everywhere; or the cheapest and the dearest; nothing is dropped."""
    units = levels.units
    kept = [[label for label in unit.levels if label != "dropped"] for unit in units]
    shared = [[label] * len(units) for label in kept[0] if all(label in labels for labels in kept)]
    found = shared if len(shared) > 1 else [[labels[end] for labels in kept] for end in (0, -1)]
    return [tuple(unit.levels.index(label) for unit, label in zip(units, row, strict=True)) for row in found]


def measured(
    program: Program,
    model: str,
    levels: LevelSet,
    *,
    machine: str,
    threads: int = 1,
    depth: int = 64,
    rounds: int = 40,
    profiles: int = 10,
    progress: Callable[[int, int, str], None] | None = None,
) -> LatencyTable:
    """The table of a model's levels, checked against whole models of random levels.

    Args:
        machine: its name, for the table.
        depth: tokens of the text before the one that is timed.
        rounds: times that everything is run.
        profiles: number of random assignments that the table is checked on; none of its numbers comes from them.

    Raises:
        InvalidSettingError: a number out of range; whole models took less time than their products; or as
            :func:`layers_of`.
    """
    if threads < 1 or depth < 0 or rounds < 1 or profiles < 2:
        raise InvalidSettingError(
            f"threads={threads}, depth={depth}, rounds={rounds}, profiles={profiles}: give at least 1, 0, 1 and 2"
        )
    layers, known = layers_of(levels, program.name), references(levels)
    drawn, read = random_profiles(levels, profiles), min(READ, _bytes(levels))
    with contextlib.ExitStack() as stack:
        products = {layer: stack.enter_context(program.product(choice, read)) for layer, choice in layers.items()}
        models = [stack.enter_context(program.model(levels, one, depth)) for one in (*known, *drawn)]
        times: dict[Any, list[float]] = {key: [] for key in (*products, *range(len(models)))}
        for done in range(rounds):
            for layer, product in products.items():
                times[layer] += [product.nanoseconds() for _ in range(RUNS)][1:]
            for number, whole in enumerate(models):
                times[number] += [whole.nanoseconds() for _ in range(RUNS)][1:]
            if progress:
                progress(done + 1, rounds, "rounds of products and whole models")
    usual = {key: min(found) for key, found in times.items()}
    alone = [_sum(levels, one, usual, program.name) for one in (*known, *drawn)]
    taken = [usual[number] for number in range(len(alone))]
    rest = float(np.mean([w - a for w, a in zip(taken[: len(known)], alone, strict=False)]))
    if rest < 0:
        raise InvalidSettingError(
            f"the products of a token took {-rest / 1e6:.3g} ms longer than whole models: other programs ran meanwhile;"
            f" measure again, with more than rounds={rounds}"
        )
    predicted = [rest + a for a in alone]
    rows = [{"predicted": round(p), "measured": round(m)} for p, m in zip(predicted, taken, strict=True)]
    told = {"profiles": rows[len(known) :], "references": rows[: len(known)]}
    return LatencyTable(
        machine,
        program.name,
        program.version,
        threads,
        depth,
        sizes_of(ModelShape.of(configuration(model))),
        round(rest),
        {layer: round(usual[layer]) for layer in layers},
        {**agreement(predicted[len(known) :], taken[len(known) :]), **told},
    )


def _bytes(levels: LevelSet) -> int:
    """Of all layers, at the levels in the middle."""
    middle = (level[len(level) // 2] for _, level in levels.rows())
    return sum(choice.level.storage for choices in middle for choice in choices) // 8


def _sum(levels: LevelSet, assignment: Assignment, times: Mapping[Any, float], program: str) -> float:
    """Nanoseconds of the products of an assignment."""
    chosen = levels.chosen(assignment).values()
    return sum(times[layer_of(choice)] for choice in chosen if takes_time(choice, program))
