"""Compare methods on the same cases: paired differences, win rates, and a ranking by the ISLES'22 scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, rankdata

from ensemble.evaluate.intervals import (
    TOO_SKEWED,
    holm_correction,
    interval_ends,
    mean_interval,
    median_interval,
    merge_rounding_differences,
    proportion_interval,
    resampled_means,
    wilcoxon_p,
)
from ensemble.evaluate.methods import Method
from ensemble.evaluate.scores import MEASURES, SKEWED
from ensemble.types import FloatArray

#: Whether a larger value of a measure is better.
LARGER_IS_BETTER = {"dice": True, "lesion_f1": True, "avd_ml": False, "alcd": False}


@dataclass(frozen=True)
class PairedComparison:
    """One measure of two methods on the cases that both have: first minus second."""

    measure: str
    first: str
    second: str
    n: int
    mean_difference: float
    mean_ci_low: float | None
    """Student's 95 % interval; none of volumes, which are too skewed."""
    mean_ci_high: float | None
    median_difference: float
    median_ci_low: float | None
    """Distribution-free 95 % interval."""
    median_ci_high: float | None
    first_better: int
    equal: int
    second_better: int
    win_rate: float | None
    """Share of cases in which the first is better, of those in which one is."""
    win_rate_ci_low: float | None
    """Exact binomial 95 % interval."""
    win_rate_ci_high: float | None
    p: float | None
    """Wilcoxon's signed-rank test."""
    p_holm: float | None
    """Corrected for all rows."""
    note: str = ""


@dataclass(frozen=True)
class MethodRank:
    """The rank of a method, and how certain it is (by resampling cases)."""

    method: str
    place: float
    """1 is best; equal methods share the mean of their places."""
    mean_rank: float
    """Over cases and the four measures."""
    mean_rank_ci_low: float | None
    """Student's 95 % interval over cases."""
    mean_rank_ci_high: float | None
    n: int
    not_measured: int
    """Cases in which it counts as last, since it has no mask that can be measured."""
    place_low: float | None
    """95 % of the bootstrap resamples of the cases place it between these."""
    place_high: float | None
    first_share: float | None
    """Share of the resamples in which it alone is first."""
    note: str = ""


@dataclass(frozen=True)
class Ranking:
    """All methods, best first, and how stable the order is under resampling."""

    rows: list[MethodRank]
    kendall_tau: float | None
    """Median over the resamples of Kendall's tau with the order of all cases; None if that has ties only, or there is one case."""


def compare_methods(methods: Sequence[Method]) -> list[PairedComparison]:
    """Compare all methods pairwise, on the cases that both have."""
    rows = []
    for first, second in combinations(methods, 2):
        common = [case for case in first.scores if case in second.scores]
        for measure in MEASURES if common else ():
            one, other = (
                np.array([getattr(method.scores[case], measure) for case in common], float)
                for method in (first, second)
            )
            rows.append(compare_pair(measure, (first.name, second.name), one, other, LARGER_IS_BETTER[measure]))
    return correct_p_values(rows)


def correct_p_values(rows: Sequence[PairedComparison]) -> list[PairedComparison]:
    """Return the rows with Holm-corrected p-values."""
    return [replace(row, p_holm=p) for row, p in zip(rows, holm_correction([row.p for row in rows]), strict=True)]


def compare_pair(
    measure: str, names: tuple[str, str], first: FloatArray, second: FloatArray, larger_is_better: bool
) -> PairedComparison:
    """Compare two methods by one measure: `first` and `second` are its values (cases,) on the same cases, at least one."""
    differences = merge_rounding_differences(first - second)
    good = differences if larger_is_better else -differences
    wins, losses = int((good > 0).sum()), int((good < 0).sum())
    mean, median = None if measure in SKEWED else mean_interval(differences), median_interval(differences)
    rate = proportion_interval(wins, wins + losses)
    return PairedComparison(
        measure,
        *names,
        len(differences),
        float(differences.mean()),
        *interval_ends(mean),
        float(np.median(differences)),
        *interval_ends(median),
        wins,
        len(differences) - wins - losses,
        losses,
        wins / (wins + losses) if rate else None,
        *interval_ends(rate),
        wilcoxon_p(differences),
        None,
        _note(differences, measure in SKEWED),
    )


def _note(differences: FloatArray, skewed: bool) -> str:
    """Return why an interval is missing."""
    if np.ptp(differences) == 0:
        return "all differences are equal" if differences.any() else "equal in all cases"
    said = [TOO_SKEWED] * skewed
    said += ["an interval of the mean needs at least 3 cases"] * (len(differences) < 3 and not skewed)
    return "; ".join(said + ["an interval of the median needs at least 6 cases"] * (len(differences) < 6))


def rank_methods(methods: Sequence[Method]) -> Ranking | None:
    """Rank methods as ISLES'22 does: by case and measure, then by the mean of these ranks. None for a single method.

    A method that has no measurable mask for a case ranks last in that case, as in challenges: it must not gain by failing on hard
    cases. Cases for which no method has a mask are ignored.
    """
    cases = list(dict.fromkeys(case for method in methods for case in method.scores))
    if len(methods) < 2:
        return None
    ranks = case_ranks(methods, cases)
    means = merge_rounding_differences(ranks.mean(axis=0))
    places = rankdata(means)
    drawn = rankdata(merge_rounding_differences(resampled_means(ranks)), axis=1) if len(cases) > 1 else None
    rows = []
    for number, method in enumerate(methods):
        interval = mean_interval(ranks[:, number])
        low, high = (
            (None, None)
            if drawn is None
            else np.quantile(drawn[:, number], (0.025, 0.975), method="closest_observation")
        )
        rows.append(
            MethodRank(
                method.name,
                float(places[number]),
                float(means[number]),
                *interval_ends(interval),
                len(cases),
                sum(case not in method.scores for case in cases),
                None if low is None else float(low),
                None if high is None else float(high),
                None if drawn is None else float((drawn[:, number] == 1).mean()),
                "intervals need more than one case" if drawn is None else "",
            )
        )
    return Ranking(sorted(rows, key=lambda row: row.place), None if drawn is None else _tau(places, drawn))


def case_ranks(methods: Sequence[Method], cases: Sequence[Path]) -> FloatArray:
    """Return each method's rank in each case, averaged over the measures: (cases, methods). 1 is best; ties share the mean rank."""
    of_measures = []
    for measure in MEASURES:
        worst = -np.inf if LARGER_IS_BETTER[measure] else np.inf
        values = np.array(
            [[getattr(m.scores[case], measure) if case in m.scores else worst for m in methods] for case in cases],
            float,
        )
        of_measures.append(
            rankdata(merge_rounding_differences(-values if LARGER_IS_BETTER[measure] else values), axis=1)
        )
    return np.asarray(np.mean(of_measures, axis=0))


def _tau(places: FloatArray, drawn: FloatArray) -> float | None:
    """Return the median Kendall's tau-b between two orders; resamples in which all methods tie count as 0."""
    if np.ptp(places) == 0:
        return None
    orders, often = np.unique(drawn, axis=0, return_counts=True)
    taus = [0.0 if np.ptp(order) == 0 else float(kendalltau(places, order).statistic) for order in orders]
    return float(np.median(np.repeat(taus, often)))
