"""A plan's searchers asked once on a problem's space, so that what cannot work is refused before any work."""

from __future__ import annotations

from evo_hpo.errors import BudgetError, EvoHpoError, PlanError
from evo_hpo.run.plan import Plan
from evo_hpo.search.budget import Ledger
from evo_hpo.search.registry import Preview, make_searcher
from evo_hpo.search.trial import Probe


def rehearse(plan: Plan, preview: Preview) -> None:
    """Makes every searcher of the plan, asks it once, and checks that its first batch can be drawn and paid.

    Raises:
        PlanError: naming the searcher and the fault.
    """
    budget, tokens = plan.budget, preview.tokens
    try:
        ledger = Ledger(budget, tokens)
        preview.check(tokens)
    except EvoHpoError as error:
        raise PlanError(str(error)) from error
    for entry in plan.searchers:
        try:
            searcher = make_searcher(entry.name, preview.space, seed=0, **entry.settings)
            batch = searcher.next_probe(ledger.allowance()) or searcher.ask(ledger.allowance())
            if batch is None:
                raise BudgetError(f"a budget of {budget.amount:g} {budget.kind}: {searcher.stop_reason}")
            each = tokens if batch.tokens is None else batch.tokens
            least, what = (batch.reads, "sensitivities") if isinstance(batch, Probe) else (1, "one trial")
            if ledger.allowance().affords(least, each) < least:
                raise BudgetError(
                    f"a budget of {budget.amount:g} {budget.kind} does not pay for {what} of {each} tokens:"
                    " raise it or score on fewer tokens"
                )
            for fidelity in (*searcher.fidelities(), each):
                preview.check(fidelity or tokens)
        except EvoHpoError as error:
            raise PlanError(f"searcher {entry.key!r}: {error}") from error
