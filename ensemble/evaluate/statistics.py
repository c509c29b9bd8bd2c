"""Summary statistics over cases: mean, median, quartiles and bootstrap intervals, overall and by lesion size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from ensemble.evaluate.scores import MEASURES, Score
from ensemble.types import FloatArray

#: Upper bounds in ml of groups of cases by their true lesion volume; 70 ml is where thrombectomy trials called a core large.
CASE_BOUNDS_ML = (1.0, 10.0, 70.0)
#: Upper bounds in ml of groups of single lesions.
LESION_BOUNDS_ML = (0.1, 1.0, 10.0)
_RESAMPLES = 9999


@dataclass(frozen=True)
class MeasureSummary:
    """Distribution of one measure over one group of cases."""

    group: str
    measure: str
    n: int
    mean: float
    mean_ci_low: float
    """Bootstrap 95 % interval (percentile, 9999 resamples, fixed seed); the mean itself if there is one value."""
    mean_ci_high: float
    median: float
    median_ci_low: float
    median_ci_high: float
    q1: float
    q3: float


def summarise(scores: Sequence[Score]) -> list[MeasureSummary]:
    """Return all measures over all cases and by true lesion volume, then the share of true lesions detected, by their size."""
    rows = []
    for group, members in _case_groups(scores):
        rows += [_summary(group, name, [getattr(score, name) for score in members]) for name in MEASURES]
    found = [(ml, hit) for score in scores for ml, hit in zip(score.lesions_ml, score.lesions_found, strict=True)]
    for group, low, high in size_ranges(LESION_BOUNDS_ML):
        if hits := [float(hit) for ml, hit in found if low < ml <= high]:
            rows.append(_summary(f"lesions {group}", "found", hits))
    return rows


def _case_groups(scores: Sequence[Score]) -> list[tuple[str, list[Score]]]:
    groups = [("all cases", list(scores)), ("cases without lesion", [s for s in scores if s.truth_ml == 0])]
    groups += [
        (f"cases {name}", [s for s in scores if low < s.truth_ml <= high])
        for name, low, high in size_ranges(CASE_BOUNDS_ML)
    ]
    return [(name, members) for name, members in groups if members]


def size_ranges(bounds: Sequence[float]) -> list[tuple[str, float, float]]:
    """Return (label, low, high) in ml of each size range: below the first bound, between bounds, and above the last."""
    names = [
        f"up to {bounds[0]:g} ml",
        *(f"{low:g} to {high:g} ml" for low, high in zip(bounds, bounds[1:], strict=False)),
    ]
    return list(zip([*names, f"above {bounds[-1]:g} ml"], [0.0, *bounds], [*bounds, float("inf")], strict=True))


def _summary(group: str, measure: str, numbers: Sequence[float]) -> MeasureSummary:
    values = np.asarray(numbers, dtype=float)
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return MeasureSummary(
        group, measure, len(values), float(values.mean()), *_interval(values, np.mean), median, *_interval(values, np.median),
        q1, q3,
    )  # fmt: skip


def _interval(values: FloatArray, statistic: object) -> tuple[float, float]:
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), statistic, n_resamples=_RESAMPLES, batch=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)
