"""The search for the worst assignment instead: the same steps, told the negative of every loss."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from evo_hpo.search.procedure import Steps
from evo_hpo.search.trial import Batch, Outcome


def inverted(steps: Steps[None]) -> Steps[None]:
    """Steps that ask for what these ask for, and tell them outcomes in which the worst has the least loss.

    No trial is stopped early: of one that is, only a lower bound of the loss is known, no use where the worst are
    wanted. What is recorded are the losses as they are.
    """
    told: Any = None
    with suppress(StopIteration):
        while True:
            asked = steps.send(told)
            if isinstance(asked, Batch):
                asked = replace(asked, terms=replace(asked.terms, keep=None))
            told = yield asked
            if isinstance(asked, Batch):
                told = [o if o.status == "failed" else _inverted(o) for o in told]


def _inverted(outcome: Outcome) -> Outcome:
    parts = outcome.by_sequence
    return replace(outcome, loss=-outcome.loss, by_sequence=None if parts is None else tuple([-x for x in parts]))
