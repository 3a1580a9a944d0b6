"""Evaluators of a tiny Llama whose linear layers are rounded."""

from __future__ import annotations

from typing import Any

from torch import nn

from evo_hpo.levels.levels import Levels
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Assignment
from tests.tiny import RoundedLevels, tiny_tokens

LENGTH = 12
SMALL, LARGE = Minibatch(5, 3 * LENGTH), Minibatch(5, 7 * LENGTH)

Parts = tuple[nn.Module, RoundedLevels]


def make_evaluator(parts: tuple[nn.Module, Levels], **settings: Any) -> Evaluator:
    """One thread, 8 sequences, unless the settings say otherwise."""
    return Evaluator(*parts, tiny_tokens(length=LENGTH), **{"threads": 1, **settings})


def losses_of(evaluator: Evaluator, candidates: list[Assignment], minibatch: Minibatch = LARGE) -> list[float]:
    """In the order of the candidates; all of them scored to the end."""
    return [s.loss for s in evaluator.score(candidates, minibatch)]
