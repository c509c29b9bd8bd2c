"""Do the 95 % intervals of `evaluate` hold the truth in 95 % of studies? Simulated studies whose truth is known from a large population.

    python -m benchmarks.coverage [--studies 200] [--cases 5,10,20,40] [--resamples 1999]

A patient has a severity; lesion volume (log-normal), number of lesions, NIHSS and mRS go with it. Two methods predict volume with errors of
their own, miss small lesions at times, add false ones, and reach a Dice that grows with the lesion. Printed: for each interval the
share of studies in which it holds the population's value, of those in which it is given. With 200 studies a true 95 % shows as 92 to 98.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ensemble.evaluate.clinical import QUANTITIES
from ensemble.evaluate.compare import LARGER_IS_BETTER, case_ranks, compare_pair, rank_methods
from ensemble.evaluate.intervals import merge_rounding_differences, spearman_intervals
from ensemble.evaluate.methods import Method
from ensemble.evaluate.scores import MEASURES, Score
from ensemble.types import FloatArray

_POPULATION = 100_000
#: Of the two methods: error of the logarithm of volume, volume at which half the lesions are missed (ml), false lesions a case, skill.
METHODS = {"first": (0.3, 0.15, 0.4, 2.2), "second": (0.45, 0.3, 0.8, 1.9)}
Columns = dict[str, FloatArray]


def population(n: int, rng: np.random.Generator) -> tuple[dict[str, Columns], Columns]:
    """Draw patients: of each method its measures and quantities, and the clinical scores, each (n,)."""
    severity = rng.normal(size=n)
    truth_ml = np.exp(1.5 + 1.5 * severity)
    lesions = 1 + rng.poisson(1.0 + np.exp(0.5 * severity))
    nihss = np.clip(np.round(6 + 4 * severity + rng.normal(0, 4, n)), 0, 42)
    mrs = np.clip(np.round(2.5 + 1.2 * severity + rng.normal(0, 1.3, n)), 0, 6)
    methods = {}
    for name, (error, missed_at, false, skill) in METHODS.items():
        missed = rng.random(n) < 1 / (1 + (truth_ml / missed_at) ** 1.5)
        false_lesions = rng.poisson(false, n)
        predicted = truth_ml * np.exp(rng.normal(0, error, n)) * ~missed + 0.05 * false_lesions
        found = rng.binomial(lesions, 0.85) * ~missed
        dice = rng.beta(3 * skill, 3 * (1 + 1 / (0.4 + truth_ml))) * ~missed
        methods[name] = {
            "dice": dice,
            "lesion_f1": 2 * found / (found + lesions + false_lesions),
            "avd_ml": abs(predicted - truth_ml),
            "alcd": abs(found + false_lesions - lesions).astype(float),
            "predicted_ml": predicted,
            "truth_ml": truth_ml,
            "predicted_lesions": (found + false_lesions).astype(float),
            "truth_lesions": lesions.astype(float),
        }
    return methods, {"nihss": nihss, "mrs": mrs}


def as_methods(drawn: dict[str, Columns]) -> list[Method]:
    """Return what was drawn as measured methods."""
    paths = [Path(f"{case:06d}") for case in range(len(drawn["first"]["dice"]))]
    made = []
    for name, columns in drawn.items():
        scores = {
            path: Score(
                case=path.name,
                **{field: float(values[number]) for field, values in columns.items() if "lesions" not in field},  # type: ignore[arg-type]
                **{field: int(values[number]) for field, values in columns.items() if field.endswith("lesions")},
                missed_lesions=0,
                false_lesions=0,
                lesions_ml=(),
                lesions_found=(),
            )
            for number, path in enumerate(paths)
        }
        made.append(Method(name, Path(name), {}, scores, {}, ()))
    return made


def coverage(studies: int, cases: int, resamples: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Return of each interval in how many simulated studies it holds the truth, and in how many it is given."""
    rng = np.random.default_rng(seed)
    truth = _truth(*population(_POPULATION, rng))
    held: dict[str, list[bool]] = defaultdict(list)
    for _ in range(studies):
        drawn, scores = population(cases, rng)
        for name, interval in _intervals(drawn, scores, resamples).items():
            if interval is not None:
                held[name].append(interval[0] <= truth[name] <= interval[1])
    return {name: (sum(found), len(found)) for name, found in held.items()}


def _intervals(drawn: dict[str, Columns], scores: Columns, resamples: int) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float | None, float | None]] = {}
    for measure in MEASURES:
        first, second = (drawn[name][measure] for name in METHODS)
        row = compare_pair(measure, ("first", "second"), first, second, LARGER_IS_BETTER[measure])
        found[f"mean difference of {measure}"] = row.mean_ci_low, row.mean_ci_high
        found[f"median difference of {measure}"] = row.median_ci_low, row.median_ci_high
        found[f"win rate by {measure}"] = row.win_rate_ci_low, row.win_rate_ci_high
    ranked = rank_methods(as_methods(drawn))
    assert ranked is not None
    first_rank = next(row for row in ranked.rows if row.method == "first")
    found["mean rank"] = first_rank.mean_rank_ci_low, first_rank.mean_rank_ci_high
    columns = drawn["first"]
    for quantity, (predicted, true) in QUANTITIES.items():
        for score, wanted in scores.items():
            intervals = spearman_intervals(columns[predicted], columns[true], wanted, resamples)
            for what, interval in zip(("rho", "rho of true masks", "difference of rho"), intervals, strict=True):
                found[f"{what}, {quantity} and {score}"] = interval or (None, None)
    return {
        name: (ends[0], ends[1]) if ends[0] is not None and ends[1] is not None else None
        for name, ends in found.items()
    }


def _truth(drawn: dict[str, Columns], scores: Columns) -> dict[str, float]:
    """Return what the intervals estimate, of the whole population."""
    truth = {}
    for measure in MEASURES:
        difference = merge_rounding_differences(drawn["first"][measure] - drawn["second"][measure])
        good = difference if LARGER_IS_BETTER[measure] else -difference
        truth[f"mean difference of {measure}"] = float(difference.mean())
        truth[f"median difference of {measure}"] = float(np.median(difference))
        truth[f"win rate by {measure}"] = float((good > 0).sum() / (good != 0).sum())
    some = as_methods(
        {name: {field: one[:20_000] for field, one in columns.items()} for name, columns in drawn.items()}
    )
    truth["mean rank"] = float(case_ranks(some, list(some[0].scores))[:, 0].mean())
    columns = drawn["first"]
    for quantity, (predicted, true) in QUANTITIES.items():
        for score, wanted in scores.items():
            ours, theirs = (float(spearmanr(columns[one], wanted).statistic) for one in (predicted, true))
            truth[f"rho, {quantity} and {score}"] = ours
            truth[f"rho of true masks, {quantity} and {score}"] = theirs
            truth[f"difference of rho, {quantity} and {score}"] = ours - theirs
    return truth


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--cases", default="5,10,20,40", help="cases a study, several by commas")
    parser.add_argument("--resamples", type=int, default=1999)
    options = parser.parse_args(arguments)
    sizes = [int(size) for size in options.cases.split(",")]
    found = {size: coverage(options.studies, size, options.resamples) for size in sizes}
    print("| interval | " + " | ".join(f"{size} cases" for size in sizes) + " |")
    print("| --- |" + " --- |" * len(sizes))
    for name in dict.fromkeys(name for size in sizes for name in found[size]):
        cells = [found[size].get(name) for size in sizes]
        print(f"| {name} | " + " | ".join(f"{cell[0] / cell[1]:.1%}" if cell else "not given" for cell in cells) + " |")


if __name__ == "__main__":
    main()
