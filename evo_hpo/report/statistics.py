"""Statistics of comparisons: intervals, paired tests, ranks. Values are losses: lower is better.

Rows are (problem, seed) pairs, columns are searchers. Sources: interquartile mean with bootstrap intervals as in
Agarwal et al., "Deep RL at the Edge of the Statistical Precipice" (2021); ranks, Friedman test and critical difference
as in Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (2006); rank-biserial correlation of
matched pairs as in Kerby (2014); stochastic superiority A as in Vargha and Delaney (2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Statistic = Callable[..., Any]
RESAMPLES = 10_000
FEW = 5
"""With fewer values than this an interval is their range: resampling so few says nothing more."""


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds; ``kind`` says what they are: ``range``, ``value`` or ``95 % bootstrap``."""

    estimate: float
    low: float
    high: float
    kind: str
    count: int


NOTHING = Interval(math.nan, math.nan, math.nan, "none", 0)


def _finite(values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array[~np.isnan(array)]


def interquartile_mean(values: Sequence[float] | Floats, axis: int = -1) -> Floats:
    """Mean of the middle half: floor(n / 4) values are cut off each end."""
    return np.asarray(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=axis))


def bootstrap(
    values: Sequence[float] | Floats,
    statistic: Statistic = np.median,
    *,
    strata: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of one sample; with ``strata``, values are resampled inside their stratum."""
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    groups = _strata(known, strata)
    array = array[known]
    rng = np.random.default_rng(seed)
    picks = np.concatenate([g[rng.integers(len(g), size=(resamples, len(g)))] for g in groups], axis=1)
    low, high = np.quantile(statistic(array[picks], axis=-1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(array)), float(low), float(high), f"{100 * confidence:g} % bootstrap", len(array))


def _strata(known: npt.NDArray[np.bool_], strata: Sequence[object] | None) -> list[npt.NDArray[np.intp]]:
    """Positions among the known values, by stratum."""
    if strata is None:
        return [np.arange(int(known.sum()))]
    names = [s for s, k in zip(strata, known, strict=True) if k]
    return [np.flatnonzero([n == name for n in names]) for name in dict.fromkeys(names)]


def spread(
    values: Sequence[float] | Floats, statistic: Statistic = np.median, strata: Sequence[object] | None = None
) -> Interval:
    """The interval to show beside a statistic: bootstrap from :data:`FEW` values on, else their range."""
    array = _finite(values)
    if not len(array):
        return NOTHING
    if len(array) >= FEW and np.isfinite(array).all():
        return bootstrap(values, statistic, strata=strata)
    kind = "value" if len(array) == 1 else "range"
    with np.errstate(invalid="ignore"):  # between -inf and inf there is no middle: NaN
        estimate = float(statistic(array))
    return Interval(estimate, float(array.min()), float(array.max()), kind, len(array))


def _paired(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = ~(np.isnan(x) | np.isnan(y))
    return x[known], y[known]


def _differences(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> Floats:
    """a - b; two failures (inf) are a tie, one failure is beyond every finite difference."""
    x, y = _paired(a, b)
    with np.errstate(invalid="ignore"):
        return np.where(x == y, 0.0, x - y)


def wins_ties_losses(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> tuple[int, int, int]:
    """How often a is below b, equal to it, above it."""
    d = _differences(a, b)
    return int((d < 0).sum()), int((d == 0).sum()), int((d > 0).sum())


def superiority(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Probability that a random value of a is below a random value of b, ties half (A of Vargha and Delaney)."""
    x, y = _finite(a)[:, None], _finite(b)[None, :]
    return float(((x < y) + 0.5 * (x == y)).mean())


def rank_biserial(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Matched-pairs rank-biserial correlation, -1 to 1; positive: a is lower. Ties of a pair are left out."""
    d = _differences(a, b)
    d = d[d != 0]
    if not len(d):
        return 0.0
    ranks = stats.rankdata(np.abs(d))
    return float((ranks[d < 0].sum() - ranks[d > 0].sum()) / ranks.sum())


def least_p(pairs: int) -> float:
    """The least p that a two-sided Wilcoxon signed-rank test can give on this many pairs: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - pairs))


def pairs_needed(comparisons: int, alpha: float = 0.05) -> int:
    """Least number of pairs from which a Holm-corrected signed-rank test can give p below alpha."""
    return next(n for n in range(1, 10_000) if least_p(n) * comparisons < alpha)


def wilcoxon(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """p of the two-sided Wilcoxon signed-rank test; 1 when all pairs are ties."""
    d = _differences(a, b)
    d = d[d != 0]
    if not len(d):
        return 1.0
    if np.isinf(d).any():  # the test needs ranks only
        d = np.sign(d) * stats.rankdata(np.abs(d))
    # scipy is exact up to 50 pairs unless some are level; its normal approximation is off for small samples.
    if len(d) <= 50 and len(np.unique(np.abs(d))) < len(d):
        return _exact_signed_rank(d)
    return float(stats.wilcoxon(d, method="auto").pvalue)


def _exact_signed_rank(d: Floats) -> float:
    """Two-sided p from the distribution of the rank sum over all 2^n signs, with mean ranks where values are level."""
    doubled = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)
    chances = np.ones(1)
    for rank in doubled:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    found = int(doubled[d > 0].sum())
    return float(min(1.0, 2 * min(chances[: found + 1].sum(), chances[found:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        running = max(running, (len(p_values) - position) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def average_ranks(table: npt.ArrayLike) -> Floats:
    """Mean rank of each column over the rows; 1 is best, ties share their mean rank."""
    return np.asarray(stats.rankdata(np.asarray(table, dtype=np.float64), axis=1).mean(axis=0))


def friedman(table: npt.ArrayLike) -> float:
    """p of the Friedman test that all columns are alike; NaN with fewer than 3 columns or 2 rows."""
    array = np.asarray(table, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < 3 or array.shape[0] < 2:
        return math.nan
    if (array == array[:, :1]).all():
        return 1.0
    return float(stats.friedmanchisquare(*array.T).pvalue)


def critical_difference(searchers: int, pairs: int, alpha: float = 0.05) -> float:
    """Difference of average ranks from which the Nemenyi test calls two searchers different."""
    q = float(stats.studentized_range.ppf(1 - alpha, searchers, np.inf)) / math.sqrt(2)
    return q * math.sqrt(searchers * (searchers + 1) / (6 * pairs))


def cliques(ranks: Sequence[float] | Floats, difference: float) -> list[tuple[int, ...]]:
    """Maximal runs of searchers (indices, best first) whose ranks differ by less than ``difference``."""
    order = [int(i) for i in np.argsort(ranks, kind="stable")]
    found: list[tuple[int, ...]] = []
    for start in range(len(order)):
        stop = start + 1
        while stop < len(order) and ranks[order[stop]] - ranks[order[start]] < difference:
            stop += 1
        run = tuple(order[start:stop])
        if len(run) > 1 and not (found and set(run) <= set(found[-1])):
            found.append(run)
    return found


@dataclass(frozen=True)
class PairedTest:
    """One searcher against another over the pairs that both finished.

    Attributes:
        pairs: how many; ``wins``, ``ties``, ``losses`` of ``a`` add up to it.
        difference: median (a - b) with its interval; negative: a is better.
        p: two-sided Wilcoxon signed-rank; ``p_holm``: corrected for all comparisons made together.
        effect: rank-biserial correlation, positive: a is better; ``superiority``: chance that a is below b.
        attainable: the least ``p_holm`` that so few pairs could give beside the other comparisons; unless below alpha,
            no claim is possible.
        once: both run once on each problem, whatever the seeds: more seeds would give no more pairs.
    """

    a: str
    b: str
    pairs: int
    wins: int
    ties: int
    losses: int
    difference: Interval
    p: float
    p_holm: float
    effect: float
    superiority: float
    attainable: float
    alpha: float = 0.05
    once: bool = False

    @property
    def claim(self) -> str:
        """What may be said, in words."""
        if not self.pairs:
            return "no common pairs"
        if self.attainable >= self.alpha:
            few = "one run each, too few" if self.once and self.pairs == 1 else "too few seeds"
            count = f"{self.pairs} pair{'s' if self.pairs != 1 else ''}"
            return f"{few} for a claim ({count} cannot give p < {self.attainable:.2g})"
        if self.p_holm < self.alpha:
            return "better" if self.effect > 0 else "worse"
        return "no difference shown"


def compare_pairs(
    columns: Mapping[str, Floats],
    pairs: Sequence[tuple[str, str]],
    *,
    repeated: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    fixed: Collection[str] = (),
    alpha: float = 0.05,
) -> list[PairedTest]:
    """Tests of the given (a, b) together, with Holm's correction over all of them.

    Args:
        columns: searcher -> its values, by (problem, seed); NaN where there is none.
        pairs: who is tested against whom.
        repeated: searcher -> where its value is that of a run which stands for an earlier seed already. Where both of a
            pair are, that is no further pair: nothing was drawn anew.
        fixed: the searchers that run once, whatever the seeds.
        alpha: the level of claims.
    """
    compared = list[tuple[Floats, Floats]]()
    for a, b in pairs:
        again = repeated[a] & repeated[b] if repeated else np.zeros(len(columns[a]), dtype=bool)
        compared.append(_paired(columns[a][~again], columns[b][~again]))
    p_values = [wilcoxon(x, y) if len(x) else 1.0 for x, y in compared]
    tests = []
    for place, ((a, b), (x, y), corrected) in enumerate(zip(pairs, compared, holm(p_values), strict=True)):
        wins, ties, losses = wins_ties_losses(x, y)
        least = [*p_values[:place], least_p(len(x)), *p_values[place + 1 :]]
        tests.append(
            PairedTest(
                a=a,
                b=b,
                pairs=len(x),
                wins=wins,
                ties=ties,
                losses=losses,
                difference=spread(_differences(x, y)),
                p=p_values[place],
                p_holm=corrected,
                effect=rank_biserial(x, y),
                superiority=superiority(x, y) if len(x) else math.nan,
                attainable=holm(least)[place],
                alpha=alpha,
                once=a in fixed and b in fixed,
            )
        )
    return tests
