"""Turn scores into an expected Dice with an interval, and a verdict. The parameters are in `<weights>/trust/calibration.json`.

A case is compared with the calibration patients whose images are clean (docs/adr/0026). Are its images and lesions as usual as theirs
(`looks`, one limit per score)? And is its expected Dice as high as theirs (`dice`)? Each limit is a conformal quantile of these patients,
so that a further such patient exceeds it with a known probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ensemble.files import error_in_words
from ensemble.trust.reference import UnusableReference, refuse_other_version
from ensemble.types import AnyArray

Verdict = Literal["good", "check", "poor"]
Shape = Literal["log", "logit"]

#: Scores from which the expected Dice is computed, and their scale; the signs are those of `scores.DIRECTIONS`.
INPUTS: Mapping[str, Shape] = {"agreement": "logit", "probability": "logit", "spectral": "log"}
#: Scores of how unusual the images and lesions are, each with its own limit.
ATYPICALITY_SCORES = ("rest", "histogram", "quality", "mimicry")
#: Fraction of usual patients that may exceed a limit; there are five limits.
BEYOND = 0.01
#: Factor by which the limits of the `ATYPICALITY_SCORES` are moved away from the median, since patients with another anatomy (head) than
#: those of the calibration exceed the quantile more often. Chosen on heads 4 and 9, each judged by the other heads (docs/adr/0026).
HEADS_ALLOWANCE = 1.25
#: Fraction of usual patients whose Dice is within the interval.
COVERAGE = 0.9
_VERSION = 2


@dataclass(frozen=True)
class UsualRange:
    """The range of a score among usual (in-distribution) patients; higher is less usual."""

    median: float
    limit: float

    def verdict(self, value: float) -> Verdict:
        """Return good up to the limit, poor from twice the limit's distance from the median, check between."""
        if value <= self.limit:
            return "good"
        return "check" if value <= 2 * self.limit - self.median else "poor"

    def likeness(self, value: float) -> float:
        """Return 1 up to the limit, falling to 0 beyond; for ranking only."""
        return math.exp(-max(0.0, value - self.limit) / max(self.limit - self.median, 1e-6))

    @classmethod
    def of(cls, values: Sequence[float], beyond: float = BEYOND) -> UsualRange:
        """Return the conformal quantile of usual values: a further one exceeds it with a probability of at most `beyond`.

        If there are too few values for this, the largest is the limit.
        """
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values, no limit")
        at = min(math.ceil((1 - beyond) * (len(ordered) + 1)), len(ordered))
        return cls(float(np.median(ordered)), float(ordered[at - 1]))

    def widened(self, factor: float) -> UsualRange:
        """Return the same range with its limit `factor` times as far from the median."""
        return UsualRange(self.median, self.median + factor * (self.limit - self.median))

    @classmethod
    def from_json(cls, told: Any) -> UsualRange:
        """Read the form written by `dataclasses.asdict`."""
        return cls(float(told["median"]), float(told["limit"]))


@dataclass(frozen=True)
class Calibration:
    """Parameters that turn trust scores into an expected Dice and a verdict, fitted for certain weights on cases with true masks."""

    weights: Mapping[str, Mapping[str, str]]
    """By member: SHA-256 of each file that determines its predictions."""
    intercept: float
    slopes: Mapping[str, float]
    """Logit of the expected Dice = intercept + sum of slope x input; an input is a score on the scale of `INPUTS`."""
    empty_right: float
    """Fraction of empty masks that were right, among patients of whom a third had no lesion."""
    residual: float
    """Conformal quantile of |Dice - expected|: half of the interval."""
    looks: Mapping[str, UsualRange]
    """For each of the `ATYPICALITY_SCORES` that is available: the range of its log."""
    dice: UsualRange
    """The range of minus the logit of the expected Dice."""
    about: Mapping[str, Any]
    """How the calibration was made; for the record only."""

    def logit(self, scores: Mapping[str, float]) -> float | None:
        """Return the logit of the expected Dice; None if a score is missing or nothing was fitted for it."""
        if not self.slopes or not all(name in scores for name in self.slopes):
            return None
        return self.intercept + sum(slope * transform_score(name, scores[name]) for name, slope in self.slopes.items())

    def as_json(self) -> dict[str, Any]:
        """Return a form that can be written as JSON."""
        return {"version": _VERSION} | asdict(self)

    @classmethod
    def from_json(cls, told: Any) -> Calibration:
        """Read the form written by `as_json`. Raises UnusableReference."""
        try:
            refuse_other_version("the calibration", told["version"], _VERSION)
            slopes = {str(name): float(slope) for name, slope in told["slopes"].items()}
            looks = {str(name): UsualRange.from_json(limit) for name, limit in told["looks"].items()}
            dice = UsualRange.from_json(told["dice"])
            intercept, right, residual = (float(told[name]) for name in ("intercept", "empty_right", "residual"))
            limits = (value for limit in (dice, *looks.values()) for value in vars(limit).values())
            numbers = (intercept, right, residual, *slopes.values(), *limits)
            known = set(slopes) <= set(INPUTS) and set(looks) <= set(ATYPICALITY_SCORES)
            if not known or not all(map(math.isfinite, numbers)):
                raise ValueError("not this program's numbers")
            return cls(told["weights"], intercept, slopes, right, residual, looks, dice, dict(told["about"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnusableReference(f"the calibration is damaged ({error_in_words(error)})") from error


def transform_score(name: str, score: float) -> float:
    """Return a score transformed to the scale on which scores are added."""
    if INPUTS[name] == "logit":
        kept = min(max(score, 0.02), 0.98)
        return math.log(kept / (1 - kept))
    return math.log(max(score, 1e-3))


def atypicality(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the log of each of the `ATYPICALITY_SCORES` that is available; 0 is usual, higher is less usual."""
    return {name: math.log(max(scores[name], 1e-3)) for name in ATYPICALITY_SCORES if name in scores}


def atypicality_limits(cases: Sequence[Mapping[str, float]]) -> dict[str, UsualRange]:
    """Return the usual range of each of the `ATYPICALITY_SCORES`, from the `atypicality` of usual cases."""
    found = {name: [case[name] for case in cases if name in case] for name in ATYPICALITY_SCORES}
    return {name: UsualRange.of(values).widened(HEADS_ALLOWANCE) for name, values in found.items() if values}


def expit(x: float) -> float:
    """Return the inverse of the logit."""
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, x))))


def conformal_quantile(residuals: AnyArray, coverage: float = COVERAGE) -> float:
    """Return the split-conformal quantile of absolute residuals (n,): a new one is at most that with probability `coverage`.

    Vovk et al., Algorithmic Learning in a Random World, 2005. 1 if there are too few.
    """
    at = math.ceil(coverage * (len(residuals) + 1))
    return float(np.sort(residuals)[at - 1]) if at <= len(residuals) else 1.0
