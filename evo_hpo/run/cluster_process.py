"""The process that runs a comparison's searches on a Ray cluster, each in a thread, all on the same scorers.

Needs the extra `ray` through :mod:`evo_hpo.run.scorers`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from evo_hpo.errors import EvoHpoError
from evo_hpo.run.events import ScorersUp, SearchFailed
from evo_hpo.run.plan import Plan
from evo_hpo.run.search_process import begin_process, run_tasks
from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.search.loop import one_blas_thread
from evo_hpo.search.registry import claims_of


def run_on_cluster(plan: Plan, folder: Path, resume: bool, address: str, tasks: Any, events: Any) -> None:
    """Entry point of the process: takes tasks until it has got None once for each of its threads.

    ``plan.workers`` searches are under way at the same time; 0: as many as there are scorers.
    """
    from evo_hpo.run.scorers import Scorers, connect, disconnect

    begin_process(1)
    try:
        connect(address)
        devices = [len(claims_of(entry.name, entry.settings).devices) for entry in plan.problems]
        scorers = Scorers(gpus=max(1, *devices))
    except EvoHpoError as error:
        events.put(SearchFailed("", str(error)))
        events.put(None)
        return
    events.put(ScorersUp(len(scorers)))

    def work() -> None:
        run_tasks(plan, folder, resume, tasks, events, lambda name, chosen: SpreadProblem(scorers, name, chosen))

    count = plan.workers or max(1, len(scorers))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for _ in threads:
        tasks.put(None)
    with one_blas_thread():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    scorers.close()
    disconnect()
    events.put(None)
