"""What the MLflow UI opens on: saved views of a comparison, and a note with links to them.

Saved views are experiment tags whose content is the UI's own state. That is not an interface: the layout here is that
of MLflow 3.17, it is written after everything else, and without it only the links lose their columns and charts.
"""

from __future__ import annotations

import base64
import json
import re
import statistics
import time
import urllib.parse
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evo_hpo.record.comparison import winner
from evo_hpo.record.records import SearchRecord
from evo_hpo.search.checkpoint import losses_by_text
from evo_hpo.tracking.runs import UNITS_SHOWN, safe_key

PREFIX = "mlflow.sharedViewState."
NAMEABLE = r"[\w.:() -]+"
"""Names that a filter can hold between its quotes."""

MODE = "workflowType=machine_learning"
"""Without it the UI may open in its mode for language-model applications, which shows no runs."""

TRIAL_COLUMNS = (
    *("metrics.`loss`", "metrics.`tokens`", "metrics.`average`"),
    *("params.`generation`", "params.`stage`", "tags.`parent_trial`", "params.`levels`"),
)


@dataclass(frozen=True)
class View:
    """One saved view: a name in the UI's menu, which runs it shows in which order, and how.

    Attributes:
        id: part of its link.
        where: the filter.
        order: column that is sorted by, ascending.
        columns: columns of the table.
        charts: cards of the chart mode; none: the view opens as a table.
    """

    id: str
    name: str
    where: str
    order: str
    columns: tuple[str, ...]
    charts: tuple[dict[str, Any], ...] = ()

    @property
    def tag(self) -> str:
        """Key of the experiment tag."""
        return PREFIX + self.id

    def value(self) -> str:
        """Content of the experiment tag."""
        state: dict[str, Any] = {
            "searchFilter": self.where,
            "orderByKey": self.order,
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": list(self.columns),
            "runsHiddenMode": "SHOW_ALL",
            "groupBy": None,
            "hideEmptyCharts": True,
        }
        if self.charts:
            names = [card["metricSectionId"] for card in self.charts]
            state["compareRunCharts"] = list(self.charts)
            state["compareRunSections"] = [_section(name, names.count(name)) for name in dict.fromkeys(names)]
            state["isAccordionReordered"] = True
        now = int(time.time() * 1000)
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        return json.dumps({"name": self.name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def _section(name: str, columns: int) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": columns,
        "cardHeight": 460 if columns == 1 else 360,
    }


def _line(section: str, metric: str, title: str, *, logarithmic: bool = False, points: bool = False) -> dict[str, Any]:
    return _card("LINE", section, metric.replace("/", "-"), title) | {
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "log" if logarithmic else "linear",
        **({"displayPoints": True} if points else {}),
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "ignoreOutliers": False,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "runsCountToCompare": 100,
    }


def _parallel(params: Sequence[str], metric: str, title: str) -> dict[str, Any]:
    return _card("PARALLEL", "levels", "parallel", title) | {
        "selectedParams": list(params),
        "selectedMetrics": [metric],
        "showAllRuns": False,
        "runsCountToCompare": 100,
    }


def _card(kind: str, section: str, name: str, title: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"evo-hpo-{name}",
        "metricSectionId": section,
        "displayName": title,
        "isGenerated": False,
        "deleted": False,
    }


def differing_units(records: Sequence[SearchRecord], most: int = 8) -> list[str]:
    """Names of the units whose levels differ most between what the searches recommend (by variance)."""
    space = next((r.space for r in records if r.space is not None), None)
    if space is None:
        return []
    best = [r.best for r in records if r.best is not None and len(r.best) == len(space.units)]
    spread = [statistics.pvariance(column) for column in zip(*best, strict=True)]
    order = sorted(range(len(spread)), key=lambda i: -spread[i])[:most]
    return [space.units[i].name for i in sorted(order)]


SEARCHES, TRIALS = "tags.kind = 'search'", "tags.kind = 'trial' and tags.status = 'complete'"


def views(records: Sequence[SearchRecord]) -> tuple[View, ...]:
    """The saved views of a comparison; what sorts by a loss of trials has one view a problem.

    Args:
        records: its searches, in the plan's order.
    """
    figures = dict.fromkeys(name for r in records for c in r.checkpoints for name in c.held_out)
    texts = _texts(records)
    ranged = bool(records) and all(r.space is not None and r.space.ranged for r in records)
    order = "metrics.`front/mean_loss`" if ranged else "metrics.`held_out/loss`"
    wanted = ["perplexity", *(f"{text}/{figure}" for text in texts for figure in ("loss", "gap"))]
    means = ("", *(f"{text}/" for text in texts)) if ranged else ()
    columns = (
        *(f"metrics.`front/{text}mean_loss`" for text in means),
        *("metrics.`held_out/loss`", *(f"metrics.`held_out/{name}`" for name in wanted if name in figures)),
        *("metrics.`held_out/average`", "metrics.`search/tokens`", "metrics.`final/trials`"),
        *("params.`label`", "params.`seed`", "tags.`stop_reason`"),
    )
    curves = (
        _line("held-out data", "held_out/loss", "held-out loss over tokens spent"),
        *(_line("held-out data", f"held_out/{text}/loss", f"loss on {text} over tokens spent") for text in texts),
        _line("calibration data", "search/best_loss", "best calibration loss over trials"),
        _line("calibration data", "search/trial_loss", "loss of each trial"),
        _line("spending", "search/tokens", "tokens spent over trials"),
        _line("spending", "search/average", "average cost a weight of each trial"),
    )
    problems = list(dict.fromkeys(r.problem for r in records)) or [""]
    several = len(problems) > 1
    which = ("params.`problem`",) if several else ()
    found = [
        View("searches", "Searches", SEARCHES, order, (*which, *columns)),
        View("curves", "Curves", SEARCHES, order, (*which, *columns[:3]), curves),
    ]
    for number, problem in enumerate(problems, start=1):
        if not several:
            found += _problem_views(records)
        elif re.fullmatch(NAMEABLE, problem):
            on_it = [r for r in records if r.problem == problem]
            mark = f"-{number}" if number > 1 else ""
            found += _problem_views(on_it, f" and tags.problem = '{problem}'", mark, f": {problem}")
    return tuple(found)


def _problem_views(records: Sequence[SearchRecord], only: str = "", mark: str = "", name: str = "") -> list[View]:
    """Views of one problem's trials and levels; ``only`` is added to filters, ``mark`` to ids, ``name`` to names."""
    units = [safe_key(f"unit/{name}") for name in differing_units(records)]
    few = len(records) < 4 and len(next((r.space.units for r in records if r.space), ())) <= UNITS_SHOWN
    alike = not any("instance" in r.header for r in records)  # losses of two instances cannot be compared
    ranged = any(r.space is not None and r.space.ranged for r in records)
    best = winner(r for r in records if r.checkpoints) if alike and not ranged and len(records) > 1 else None
    trials = View(f"trials{mark}", f"Best trials{name}", TRIALS + only, "metrics.`loss`", TRIAL_COLUMNS)
    found = [trials] if alike else []
    if ranged:
        found.append(_front_view(records, only, mark, name))
    if best is not None and re.fullmatch(NAMEABLE, best.search):
        where = f"{TRIALS} and tags.search = '{best.search}'"
        found.append(View(f"winner{mark}", f"Trials of {best.search}", where, "metrics.`loss`", TRIAL_COLUMNS))
    if units:
        metric = "loss" if few else "held_out/loss"
        where = (TRIALS if few else SEARCHES) + only
        chart = _parallel(units, metric, "levels of the units that differ most")
        shown = tuple(f"params.`{u}`" for u in units)
        title = f"Levels{name} (parallel coordinates)"
        found.append(View(f"levels{mark}", title, where, f"metrics.`{metric}`", shown, (chart,)))
    return found


def _front_view(records: Sequence[SearchRecord], only: str, mark: str, name: str) -> View:
    """The final front of each search: held-out loss against cost."""
    points = [p for r in records if r.checkpoints for p in r.checkpoints[-1].front]
    in_bytes = any(r.space is not None and r.space.resources[0] == "bytes" for r in records)
    axis = "kB of the layers that are searched" if in_bytes else "1000 times the average"
    texts = _texts(records)
    charts = [
        _line(
            "front",
            f"front/{text}loss",
            f"final fronts: held-out loss{' on ' * bool(text)}{text.rstrip('/')} against cost ({axis})",
            logarithmic=all(p.held_out.get(f"{text}loss", 0.0) > 0 for p in points),
            points=True,
        )
        for text in ("", *(f"{text}/" for text in texts))
    ]
    columns = (
        *(f"metrics.`front/{text}mean_loss`" for text in ("", *(f"{text}/" for text in texts))),
        *("params.`label`", "params.`seed`"),
    )
    return View(f"front{mark}", f"Front{name}", SEARCHES + only, "metrics.`front/mean_loss`", columns, tuple(charts))


def _texts(records: Sequence[SearchRecord]) -> list[str]:
    """Held-out texts after the first."""
    found = dict.fromkeys(text for r in records for c in r.checkpoints for text in losses_by_text(c.held_out))
    return list(filter(None, found))


def trials_link(experiment: str, search: str) -> str:
    """The part of a link after the server's address that opens the trials of one search, best first."""
    where = urllib.parse.quote(f"tags.kind = 'trial' and tags.search = '{search}'", safe="")
    order = urllib.parse.quote("metrics.`loss`", safe="")
    return (
        f"#/experiments/{experiment}/runs?searchFilter={where}&orderByKey={order}&orderByAsc=true&startTime=ALL&{MODE}"
    )


def link(experiment: str, view: str = "searches", *, charts: bool = False) -> str:
    """The part of a link after the server's address that opens a view."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}{mode}&{MODE}"


def note(experiment: str, title: str, made: Sequence[View], details: Mapping[str, str]) -> str:
    """The experiment's banner, in Markdown: links to its views, and facts about it."""
    links = " · ".join(f"[{v.name}]({link(experiment, v.id, charts=bool(v.charts))})" for v in made)
    facts = "\n".join(f"- {key}: {value}" for key, value in details.items())
    return f"**{title}**: {links}\n\n{facts}\n"
