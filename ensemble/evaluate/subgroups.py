"""Measures by subgroup: by columns of the clinical table, and always by size and number of the true lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble.errors import InputRefused
from ensemble.evaluate.intervals import (
    TOO_SKEWED,
    holm_correction,
    interval_ends,
    kruskal_wallis,
    mean_interval,
    median_interval,
)
from ensemble.evaluate.methods import Method
from ensemble.evaluate.scores import MEASURES, SKEWED, Score
from ensemble.evaluate.statistics import CASE_BOUNDS_ML, size_ranges
from ensemble.types import FloatArray

#: More groups than this are no groups: a column of ages, or of names.
MAX_GROUPS = 30
LESION_SIZE, LESION_NUMBER = "lesion_size", "lesion_number"
_WITHOUT = "no lesion"
#: Upper bounds of groups of cases by their number of true lesions.
_NUMBERS = ((1, "1 lesion"), (5, "2 to 5 lesions"), (np.inf, "more than 5 lesions"))


@dataclass(frozen=True)
class GroupSummary:
    """One measure of one method over one group of cases."""

    method: str
    factor: str
    """What cases are grouped by."""
    group: str
    measure: str
    n: int
    mean: float
    mean_ci_low: float | None
    """Student's 95 % interval, cut at the ends of the measure's range; none of volumes, which are too skewed."""
    mean_ci_high: float | None
    median: float
    median_ci_low: float | None
    """Distribution-free 95 % interval."""
    median_ci_high: float | None
    q1: float
    q3: float
    note: str = ""


@dataclass(frozen=True)
class GroupTest:
    """The Kruskal-Wallis test of whether a measure differs between the groups of a factor."""

    method: str
    factor: str
    measure: str
    groups: int
    n: int
    h: float | None
    p: float | None
    p_from: str
    """"chi-squared", or "permutation" where a group has fewer than five cases."""
    p_holm: float | None
    """Corrected for all rows."""
    note: str = ""


def summarise_subgroups(
    methods: Sequence[Method], columns: Mapping[str, Mapping[str, str]]
) -> tuple[list[GroupSummary], list[GroupTest], list[str]]:
    """Summarise and test every measure by each factor. Returns summaries, tests, and messages about cases that are in no group.

    `columns` are groups by case. Cases without a lesion are a group in tables of size and number, and take no part in their tests. Raises
    InputRefused where a column holds too many groups.
    """
    summaries, tests, notes = [], [], []
    for factor, known in columns.items():
        notes += _remarks(factor, known, methods)
    for method in methods:
        scores = list(method.scores.values())
        for factor, groups in _factors(scores, columns):
            for measure in MEASURES:
                values = {
                    group: np.array([getattr(one, measure) for one in cases], float) for group, cases in groups.items()
                }
                summaries += [_summary(method.name, factor, group, measure, of) for group, of in values.items()]
                tests.append(_test(method.name, factor, measure, values))
    corrected = holm_correction([test.p for test in tests])
    return summaries, [replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)], notes


def _factors(
    scores: Sequence[Score], columns: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, dict[str, list[Score]]]]:
    """Return the non-empty groups of each factor, in order."""
    factors = [
        (factor, {group: [one for one in scores if known.get(one.case) == group] for group in _ordered(known)})
        for factor, known in columns.items()
    ]
    without = [one for one in scores if one.truth_ml == 0]
    sizes = {
        name: [one for one in scores if low < one.truth_ml <= high] for name, low, high in size_ranges(CASE_BOUNDS_ML)
    }
    numbers, below = {}, 0.0
    for most, name in _NUMBERS:
        numbers[name] = [one for one in scores if below < one.truth_lesions <= most]
        below = most
    factors += [(LESION_SIZE, {_WITHOUT: without} | sizes), (LESION_NUMBER, {_WITHOUT: without} | numbers)]
    return [(factor, {group: cases for group, cases in groups.items() if cases}) for factor, groups in factors]


def _ordered(known: Mapping[str, str]) -> list[str]:
    """Return the groups sorted; numbers by size."""

    def place(group: str) -> tuple[float, str]:
        try:
            return float(group.replace(",", ".")), group
        except ValueError:
            return np.inf, group

    return sorted(set(known.values()), key=place)


def _remarks(factor: str, known: Mapping[str, str], methods: Sequence[Method]) -> list[str]:
    names = list(dict.fromkeys(one.case for method in methods for one in method.scores.values()))
    groups = {known[name] for name in names if name in known}
    if len(groups) > MAX_GROUPS:
        raise InputRefused(
            f"the column {factor!r} of the table of cases has too many groups",
            found=f"{len(groups)}: {', '.join(sorted(groups)[:5])} ...",
            do=f"merge its values into at most {MAX_GROUPS} groups, or choose another column",
        )
    said = []
    if absent := [name for name in names if name not in known]:
        said.append(f"in no group of {factor}: {', '.join(absent)}")
    alike = {group.casefold(): group for group in groups}
    if len(alike) < len(groups):
        said.append(f"groups of {factor} that differ only in case are treated as separate: {', '.join(sorted(groups))}")
    return said


def _summary(method: str, factor: str, group: str, measure: str, values: FloatArray) -> GroupSummary:
    interval = None if measure in SKEWED else mean_interval(values)
    if interval is not None:
        interval = max(0.0, interval[0]), min(1.0, interval[1]) if measure in ("dice", "lesion_f1") else interval[1]
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return GroupSummary(
        method,
        factor,
        group,
        measure,
        len(values),
        float(values.mean()),
        *interval_ends(interval),
        median,
        *interval_ends(median_interval(values)),
        q1,
        q3,
        _note(values, measure in SKEWED),
    )


def _note(values: FloatArray, skewed: bool) -> str:
    """Return why an interval is missing."""
    if len(values) < 3:
        return "an interval needs at least 3 cases"
    if np.ptp(values) == 0:
        return "all values are equal"
    return "; ".join([TOO_SKEWED] * skewed + ["an interval of the median needs at least 6 cases"] * (len(values) < 6))


def _test(method: str, factor: str, measure: str, values: Mapping[str, FloatArray]) -> GroupTest:
    compared = [of for group, of in values.items() if factor not in (LESION_SIZE, LESION_NUMBER) or group != _WITHOUT]
    found = kruskal_wallis(compared)
    note = "" if found else "fewer than two groups" if len(compared) < 2 else "all values are equal"
    h, p, source = found or (None, None, "")
    return GroupTest(method, factor, measure, len(compared), sum(map(len, compared)), h, p, source, None, note)
