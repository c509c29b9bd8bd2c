"""Fit what is usual to a user's cases: references for all members, and the limit of unlikeness."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ensemble.pipeline import Ensemble
from ensemble.trust.calibration import Calibration, Limit, unlikeness
from ensemble.trust.evidence import Evidence
from ensemble.trust.judge import read_calibration
from ensemble.trust.reference import PARTS, References, UnusableReference, fit_references
from ensemble.trust.scores import scores_of


def leave_one_out_unlikeness(evidence: Sequence[Evidence], digests: Mapping[str, Mapping[str, str]]) -> list[float]:
    """Return how unlike the others each case looks, measured from references fitted without it."""
    far: list[float] = []
    for part in range(PARTS):
        references = fit_references([e for at, e in enumerate(evidence) if at % PARTS != part], digests, least=2)
        found = (unlikeness(scores_of(e, references)) for e in evidence[part::PARTS])
        far += [x for x in found if x is not None]
    return far


def fit_user_reference(evidence: Sequence[Evidence], ensemble: Ensemble, name: str) -> tuple[References, Calibration]:
    """Fit references to a user's cases, and replace the calibration's limit of unlikeness by theirs.

    A calibration of the expected Dice is kept if it was made with these weights; otherwise the expected Dice is unknown.
    """
    digests = {member: dict(files) for member, files in ensemble.digests.items()}
    try:
        known = read_calibration(ensemble)
    except UnusableReference:
        nothing = Limit(0.0, 0.0)
        known = Calibration(digests, 0.0, {}, 1.0, 1.0, nothing, nothing, {})
    about = {**known.about, "looks_of": f"{len(evidence)} cases of {name}", "looks_made": time.strftime("%Y-%m-%d")}
    looks = Limit.of(leave_one_out_unlikeness(evidence, digests))
    return fit_references(evidence, digests), replace(known, looks=looks, about=about)
