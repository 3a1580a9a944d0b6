"""A plan's searchers asked once on a problem's space, so that what cannot work is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from evo_hpo.errors import BudgetError, EvoHpoError, PlanError
from evo_hpo.run.plan import Plan
from evo_hpo.search.budget import Ledger
from evo_hpo.search.registry import Preview, make_searcher
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import CompressionSpace


def rehearse(plan: Plan, *previews: Preview) -> None:
    """Makes every searcher of the plan, asks it once, and checks that its first batch can be drawn and paid.

    Args:
        plan: with the searchers and the budget.
        previews: of its problems. On problems that are alike in space and tokens, searchers are asked once for all.

    Raises:
        PlanError: naming the searcher and the fault.
    """
    alike: dict[tuple[CompressionSpace, int], list[Preview]] = {}
    for preview in previews:
        alike.setdefault((preview.space, preview.tokens), []).append(preview)
    for (space, tokens), those in alike.items():
        _rehearse(plan, space, tokens, those)


def _rehearse(plan: Plan, space: CompressionSpace, tokens: int, previews: Sequence[Preview]) -> None:
    budget = plan.budget

    def check(fidelity: int) -> None:
        for preview in previews:
            preview.check(fidelity)

    try:
        ledger = Ledger(budget, tokens)
        check(tokens)
    except EvoHpoError as error:
        raise PlanError(str(error)) from error
    for entry in plan.searchers:
        try:
            searcher = make_searcher(entry.name, space, seed=0, **entry.settings)
            for preview in previews:
                searcher.check_sensitivities(preview.name, preview.has_sensitivities)
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
                check(fidelity or tokens)
        except EvoHpoError as error:
            raise PlanError(f"searcher {entry.key!r}: {error}") from error
