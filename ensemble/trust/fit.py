"""Fit references and limits to a user's own cases, so that these count as usual."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ensemble.pipeline import Ensemble
from ensemble.trust.calibration import Calibration, UsualRange, atypicality, atypicality_limits
from ensemble.trust.evidence import CaseEvidence
from ensemble.trust.judge import read_calibration
from ensemble.trust.reference import PARTS, References, UnusableReference, fit_references
from ensemble.trust.scores import compute_trust_scores


def out_of_fold_atypicality(
    evidence: Sequence[CaseEvidence], digests: Mapping[str, Mapping[str, str]]
) -> list[dict[str, float]]:
    """Return the `atypicality` of each case, from references fitted without the case's fold (five folds).

    The result is in the order of the folds, not of `evidence`.
    """
    far: list[dict[str, float]] = []
    for part in range(PARTS):
        references = fit_references([e for at, e in enumerate(evidence) if at % PARTS != part], digests, least=2)
        far += [atypicality(compute_trust_scores(e, references)) for e in evidence[part::PARTS]]
    return far


def fit_user_reference(
    evidence: Sequence[CaseEvidence], ensemble: Ensemble, name: str
) -> tuple[References, Calibration]:
    """Return references fitted to a user's cases, and a calibration whose limits on images and lesions are from these cases.

    The parameters of the expected Dice are kept if they belong to these weights; otherwise no Dice is expected.
    """
    digests = {member: dict(files) for member, files in ensemble.digests.items()}
    try:
        known = read_calibration(ensemble)
    except UnusableReference:
        known = Calibration(digests, 0.0, {}, 1.0, 1.0, {}, UsualRange(0.0, 0.0), {})
    about = {**known.about, "looks_of": f"{len(evidence)} cases of {name}", "looks_made": time.strftime("%Y-%m-%d")}
    looks = atypicality_limits(out_of_fold_atypicality(evidence, digests))
    return fit_references(evidence, digests), replace(known, looks=looks, about=about)
