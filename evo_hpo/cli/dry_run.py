"""``--dry-run`` of ``compare`` and ``ablate``: what a comparison would read, take and hold; nothing is built."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evo_hpo.cli.progress import say
from evo_hpo.run.plan import Plan
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.search.registry import preview_problem, problem_factory
from evo_hpo.space.amounts import shown


def dry_run(plan: Plan, console: Console) -> None:
    """Checks a plan as if it were run, measures a short pass of each of its language models, and prints the table.

    Raises:
        EvoHpoError: what a run would refuse before any work.
    """
    plan.check()
    searches = Counter(task.problem for task in plan.planned())
    table = Table(title=f"{plan.name}: {searches.total()} searches")
    for column in ("problem", "searches", "tokens each", "tokens in all", "tokens a second", "hours", "memory"):
        table.add_column(column, justify="left" if column == "problem" else "right")
    for problem in plan.problems:
        preview = preview_problem(problem.name, problem.settings)
        rehearse(plan, preview)
        count, budget = searches[problem.key], plan.budget
        tokens = budget.tokens or (budget.evaluations or 0) * preview.tokens
        rate, memory = _forecast(problem.name, problem.settings)
        each = budget.seconds or (tokens / rate if rate else None)
        table.add_row(
            Text(problem.key),  # which may hold what would be markup
            str(count),
            f"{tokens:,}" if tokens else "–",
            f"{tokens * count:,}" if tokens else "–",
            "–" if rate is None else f"{rate:,.0f}",
            "–" if each is None else f"{each * count / 3600:.2g}",
            "–" if memory is None else shown(memory),
        )
    console.print(table)
    say(
        console,
        "tokens a second: one block of the model, of random weights, read a sequence here; on a CPU, on all cores if\n"
        "nothing else runs. Hours: one search after another, without levels that are still to build, held-out text\n"
        "and switching; candidates that share blocks, and searches that end early as uniform does, take less.\n"
        "Memory: of one process that scores. Nothing was built.",
    )


def _forecast(name: str, settings: dict[str, object]) -> tuple[float | None, int | None]:
    """Tokens a second and bytes, of a problem whose texts are there; None where nothing is known of the problem."""
    from evo_hpo.scoring.expected_levels import check_inputs
    from evo_hpo.scoring.factory import Factory
    from evo_hpo.scoring.forecast import forecast

    factory = problem_factory(name)
    if not isinstance(factory, Factory):
        return None, None
    task = factory.task(settings)
    check_inputs(task)
    found = forecast(task)
    return found.rate, found.memory
