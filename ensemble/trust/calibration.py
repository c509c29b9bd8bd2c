"""Turn scores into an expected Dice with an interval, and a verdict. The parameters are in `<weights>/trust/calibration.json`.

Two questions are asked of a case, each against the patients of the calibration whose images were as they should be (docs/adr/0026):
does it look like them (`looks`, in several respects), and is so low a Dice expected of any of them (`dice`)? The limit of each is their
conformal quantile, so that a further such patient lies beyond it with a known probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ensemble.files import error_in_words
from ensemble.trust.reference import UnusableReference
from ensemble.types import AnyArray

Verdict = Literal["good", "check", "poor"]
Shape = Literal["log", "logit"]

#: What the expected Dice hangs on, and on which scale; signs as of `scores.DIRECTIONS`.
INPUTS: Mapping[str, Shape] = {"agreement": "logit", "probability": "logit", "spectral": "log"}
#: By which a case looks like others or doesn't, each with its own limit.
UNLIKENESS_SCORES = ("rest", "histogram", "quality", "mimicry")
#: Share of patients like those of the calibration that may lie beyond a limit; there are five.
BEYOND = 0.01
#: How much further than that quantile, from the median, the limit of a look lies: patients of another head than those of the calibration
#: are no further draw of the same lot. Chosen on heads 4 and 9, each judged by the other heads (docs/adr/0026).
HEADS_ALLOWANCE = 1.25
#: Share of such patients whose Dice lies within the interval.
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

        Where there are too few values for that, the largest is the limit.
        """
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values, no limit")
        at = min(math.ceil((1 - beyond) * (len(ordered) + 1)), len(ordered))
        return cls(float(np.median(ordered)), float(ordered[at - 1]))

    def widened(self, factor: float) -> UsualRange:
        """Return the same with the limit so many times as far from the median."""
        return UsualRange(self.median, self.median + factor * (self.limit - self.median))

    @classmethod
    def from_json(cls, told: Any) -> UsualRange:
        """Read what `dataclasses.asdict` gave."""
        return cls(float(told["median"]), float(told["limit"]))


@dataclass(frozen=True)
class Calibration:
    """Parameters fitted on patients with known true masks, for certain weights."""

    weights: Mapping[str, Mapping[str, str]]
    """By member: SHA-256 of each file that determined what it predicted."""
    intercept: float
    slopes: Mapping[str, float]
    """Logit of the expected Dice = intercept + sum of slope x input; an input is a score on the scale of `INPUTS`."""
    empty_right: float
    """Share of empty masks that were right, of patients of whom a third had no lesion."""
    residual: float
    """Conformal quantile of |Dice - expected|: half of the interval."""
    looks: Mapping[str, UsualRange]
    """Of the log of each of the `UNLIKENESS_SCORES` that there is."""
    dice: UsualRange
    """Of minus the logit of the expected Dice."""
    about: Mapping[str, Any]
    """How it was made, for the record."""

    def logit(self, scores: Mapping[str, float]) -> float | None:
        """Return the logit of the expected Dice; None if a score is missing or nothing was fitted for it."""
        if not self.slopes or not all(name in scores for name in self.slopes):
            return None
        return self.intercept + sum(slope * scaled(name, scores[name]) for name, slope in self.slopes.items())

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"version": _VERSION} | asdict(self)

    @classmethod
    def from_json(cls, told: Any) -> Calibration:
        """Read what `as_json` wrote. Raises UnusableReference."""
        try:
            if told["version"] != _VERSION:
                raise UnusableReference(f"it is of version {told['version']}, this program reads {_VERSION}")
            slopes = {str(name): float(slope) for name, slope in told["slopes"].items()}
            looks = {str(name): UsualRange.from_json(limit) for name, limit in told["looks"].items()}
            dice = UsualRange.from_json(told["dice"])
            intercept, right, residual = (float(told[name]) for name in ("intercept", "empty_right", "residual"))
            limits = (value for limit in (dice, *looks.values()) for value in vars(limit).values())
            numbers = (intercept, right, residual, *slopes.values(), *limits)
            known = set(slopes) <= set(INPUTS) and set(looks) <= set(UNLIKENESS_SCORES)
            if not known or not all(map(math.isfinite, numbers)):
                raise ValueError("not this program's numbers")
            return cls(told["weights"], intercept, slopes, right, residual, looks, dice, dict(told["about"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnusableReference(f"it is damaged ({error_in_words(error)})") from error


def scaled(name: str, score: float) -> float:
    """Return a score transformed to the scale on which scores are added."""
    if INPUTS[name] == "logit":
        kept = min(max(score, 0.02), 0.98)
        return math.log(kept / (1 - kept))
    return math.log(max(score, 1e-3))


def unlikeness(scores: Mapping[str, float]) -> dict[str, float]:
    """Return how little a case looks like others, by each of the `UNLIKENESS_SCORES` that there is: its log, 0 is usual."""
    return {name: math.log(max(scores[name], 1e-3)) for name in UNLIKENESS_SCORES if name in scores}


def look_limits(cases: Sequence[Mapping[str, float]]) -> dict[str, UsualRange]:
    """Return the limit of each of the `UNLIKENESS_SCORES` that some cases (by their `unlikeness`) have."""
    found = {name: [case[name] for case in cases if name in case] for name in UNLIKENESS_SCORES}
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
