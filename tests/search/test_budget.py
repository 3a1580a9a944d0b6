"""Budgets are exactly one positive amount; allowances never pay for more than is left."""

from __future__ import annotations

from typing import Any

import pytest

from evo_hpo.errors import BudgetError
from evo_hpo.search.budget import Allowance, Budget, Ledger


@pytest.mark.parametrize(
    ("amounts", "words"),
    [
        ({}, "got none"),
        ({"tokens": 5, "seconds": 1.0}, "exactly one"),
        ({"tokens": 0}, "positive"),
        ({"seconds": float("nan")}, "positive"),
        ({"evaluations": True}, "positive"),
        ({"evaluations": 2.5}, "whole number"),
        ({"tokens": float("inf")}, "whole number"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(amounts: dict[str, Any], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget(**amounts)


def test_a_whole_number_of_another_type_is_an_integer() -> None:
    budget = Budget(tokens=1e6)  # type: ignore[arg-type]
    assert budget.tokens == 10**6
    assert isinstance(Ledger(budget, 64).allowance().affords(3), int)


def test_an_allowance_pays_for_no_more_than_is_left() -> None:
    ledger = Ledger(Budget(tokens=1000), 300)
    assert ledger.allowance().affords(9) == 3
    assert ledger.allowance().affords(9, 501) == 1
    ledger.charge([300, 300], 0.5)
    assert ledger.allowance().affords(9) == 1
    assert ledger.allowance().less(1).affords(9) == 0
    assert Allowance(evaluations=4).affords(9, 10**9) == 4
    assert Ledger(Budget(seconds=1.0)).allowance().affords(9) == 9
    with pytest.raises(BudgetError, match="reads tokens"):
        Ledger(Budget(tokens=5), 0)
