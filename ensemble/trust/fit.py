"""What is usual, learnt of cases: references for all members, and the limits of what looks like them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ensemble.pipeline import Ensemble
from ensemble.trust.calibration import Calibration, UsualRange, look_limits, unlikeness
from ensemble.trust.evidence import Evidence
from ensemble.trust.judge import read_calibration
from ensemble.trust.reference import PARTS, References, UnusableReference, fit_references
from ensemble.trust.scores import scores_of


def out_of_fold_unlikeness(
    evidence: Sequence[Evidence], digests: Mapping[str, Mapping[str, str]]
) -> list[dict[str, float]]:
    """Return how unlike the others each case is (score: value), by five-fold cross-fitting: references are fitted without the case's fold.

    In the order of the folds, not of `evidence`.
    """
    far: list[dict[str, float]] = []
    for part in range(PARTS):
        references = fit_references([e for at, e in enumerate(evidence) if at % PARTS != part], digests, least=2)
        far += [unlikeness(scores_of(e, references)) for e in evidence[part::PARTS]]
    return far


def fit_user_reference(evidence: Sequence[Evidence], ensemble: Ensemble, name: str) -> tuple[References, Calibration]:
    """Return references of a user's cases, and the calibration with their looks for usual.

    What was learnt of the Dice is kept if it was with these weights; else it is not known.
    """
    digests = {member: dict(files) for member, files in ensemble.digests.items()}
    try:
        known = read_calibration(ensemble)
    except UnusableReference:
        known = Calibration(digests, 0.0, {}, 1.0, 1.0, {}, UsualRange(0.0, 0.0), {})
    about = {**known.about, "looks_of": f"{len(evidence)} cases of {name}", "looks_made": time.strftime("%Y-%m-%d")}
    looks = look_limits(out_of_fold_unlikeness(evidence, digests))
    return fit_references(evidence, digests), replace(known, looks=looks, about=about)
