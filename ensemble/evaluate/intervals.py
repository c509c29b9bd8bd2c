"""Estimates with 95 % intervals, and tests, valid in small studies. What can't be computed reliably is None.

Which interval is used for what was chosen by simulation: `python -m benchmarks.coverage` (docs/studies.md has its figures).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from ensemble.types import AnyArray, FloatArray

LEVEL = 0.95
RESAMPLES = 9999
#: Below this many cases the bootstrap of a rank correlation, or of the difference of two, covers the truth too seldom.
MIN_CORRELATED = 20
#: The reason given if a mean has no interval: no known method has enough coverage for such skewed values in small studies.
TOO_SKEWED = "ml are too skewed for an interval of the mean"
#: Below these sample sizes, a rank test uses permutations instead of the asymptotic distribution.
_MIN_T_CORRELATION, _MIN_CHI_SQUARED = 30, 5
#: Differences of measures below this are rounding.
_ROUNDING = 1e-9
#: Numbers drawn at a time.
_BLOCK = 2_000_000

Interval = tuple[float, float]


def interval_ends(interval: Interval | None) -> tuple[float | None, float | None]:
    """Return both ends of an interval; (None, None) without one."""
    return interval or (None, None)


def mean_interval(values: FloatArray) -> Interval | None:
    """Return Student's t interval of a mean; None for fewer than three values, or if all are equal."""
    if len(values) < 3 or np.ptp(values) <= _ROUNDING:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def median_interval(values: FloatArray) -> Interval | None:
    """Return the distribution-free interval of a median, between two order statistics; None for fewer than six values.

    The narrowest symmetric one that holds the median in at least 95 % (Conover, Practical Nonparametric Statistics, 3.2).
    """
    # number of values outside the interval on either side
    rank = int(stats.binom.ppf((1 - LEVEL) / 2, len(values), 0.5))
    if rank < 1:
        return None
    ordered = np.sort(values)
    return float(ordered[rank - 1]), float(ordered[-rank])


def proportion_interval(successes: int, of: int) -> Interval | None:
    """Return the exact interval of a proportion (Clopper and Pearson 1934); None for zero trials."""
    if of == 0:
        return None
    found = stats.binomtest(successes, of).proportion_ci(LEVEL, "exact")
    return float(found.low), float(found.high)


def merge_rounding_differences(values: FloatArray) -> FloatArray:
    """Return values with those made equal that differ only by floating-point rounding."""
    return np.round(values / _ROUNDING) * _ROUNDING


def wilcoxon_p(differences: FloatArray) -> float | None:
    """Return the p-value of Wilcoxon's signed-rank test, differences of zero left out; None if all are zero."""
    differences = differences[differences != 0]
    return float(stats.wilcoxon(differences).pvalue) if len(differences) else None


def spearman(x: FloatArray, y: FloatArray) -> tuple[float, float] | None:
    """Return Spearman's rho and its p-value (two-sided; by permutations below 30 cases).

    None below three cases, or where either is constant.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found = stats.spearmanr(x, y)
    rho = float(found.statistic)
    if len(x) >= _MIN_T_CORRELATION:
        return rho, float(found.pvalue)
    ranks, other = stats.rankdata(x), stats.rankdata(y)
    shuffled = np.random.default_rng(0).permuted(np.tile(other, (RESAMPLES, 1)), axis=1)
    return rho, _extreme(_correlation(ranks[None], shuffled), rho)


def spearman_intervals(
    first: FloatArray, second: FloatArray, score: FloatArray, resamples: int = RESAMPLES
) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Return percentile bootstrap intervals of Spearman's rho between two quantities and a score: of each, and of their difference.

    All three use the same resamples of cases. None if there are too few cases, or one variable is constant.
    """
    n = len(score)
    if n < MIN_CORRELATED or any(np.ptp(one) == 0 for one in (first, second, score)):
        return None, None, None
    both = np.concatenate([_drawn(first, second, score, index) for index in _resampled(n, resamples)], axis=1)
    both = both[:, np.isfinite(both).all(axis=0)]  # a resample in which all are equal has no rho
    one, other = (_percentiles(values) for values in both)
    return one, other, _percentiles(both[0] - both[1])


def resampled_means(values: FloatArray, resamples: int = RESAMPLES) -> FloatArray:
    """Return the means of bootstrap resamples of the rows (cases, columns): (resamples, columns)."""
    return np.concatenate([values[index].mean(axis=1) for index in _resampled(len(values), resamples)])


def kruskal_wallis(groups: Sequence[FloatArray]) -> tuple[float, float, str] | None:
    """Return the Kruskal-Wallis H, its p-value, and its source ("chi-squared", or "permutation" if a group is small).

    None if there are fewer than two groups, or all values are equal.
    """
    values = np.concatenate(groups) if groups else np.empty(0)
    if len(groups) < 2 or np.ptp(values) == 0:
        return None
    found = stats.kruskal(*groups)
    if min(map(len, groups)) >= _MIN_CHI_SQUARED:
        return float(found.statistic), float(found.pvalue), "chi-squared"
    ranks, member = stats.rankdata(values), np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    shuffled = np.random.default_rng(0).permuted(np.tile(ranks, (RESAMPLES, 1)), axis=1)
    # H grows with the sum of squared rank sums over sizes, and with nothing else that a permutation changes

    def spread(rows: FloatArray) -> FloatArray:
        totals = [rows[:, member == number].sum(axis=1) ** 2 / len(group) for number, group in enumerate(groups)]
        return np.asarray(np.sum(totals, axis=0))

    return float(found.statistic), _extreme(spread(shuffled), float(spread(ranks[None])[0])), "permutation"


def holm_correction(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm-corrected p-values (Holm 1979). None, for a test that was not made, is not counted."""
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for number, (p, place) in enumerate(made):
        highest = max(highest, min(1.0, (len(made) - number) * p))
        corrected[place] = highest
    return corrected


def fleiss_kappa(counts: AnyArray) -> float | None:
    """Return Fleiss' kappa of ratings (subjects, categories): the number of raters per category, equally many for each subject.

    None below two raters or subjects, or where all chose the same.
    """
    raters = int(counts[0].sum()) if len(counts) else 0
    if raters < 2 or len(counts) < 2:
        return None
    shares = counts.sum(axis=0) / counts.sum()
    by_chance = float((shares**2).sum())
    agreed = float((((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))).mean())
    return (agreed - by_chance) / (1 - by_chance) if by_chance < 1 else None


def _resampled(n: int, resamples: int) -> list[AnyArray]:
    """Yield the case indices of the bootstrap resamples in blocks (resamples, n); the same at every call."""
    rng, rows = np.random.default_rng(0), max(1, _BLOCK // n)
    return [rng.integers(n, size=(min(rows, resamples - start), n)) for start in range(0, resamples, rows)]


def _drawn(first: FloatArray, second: FloatArray, score: FloatArray, index: AnyArray) -> FloatArray:
    wanted = stats.rankdata(score[index], axis=1)
    return np.stack([_correlation(stats.rankdata(one[index], axis=1), wanted) for one in (first, second)])


def _correlation(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return Pearson's correlation of rows (resamples, n); NaN where a row is constant."""
    x, y = (one - one.mean(axis=1, keepdims=True) for one in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))


def _percentiles(values: FloatArray) -> Interval:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _extreme(drawn: FloatArray, observed: float) -> float:
    """Return the share of permutations at least as far from 0 as the observed value, which counts as one of them."""
    return float((np.sum(np.abs(drawn) >= abs(observed) * (1 - _ROUNDING)) + 1) / (len(drawn) + 1))
