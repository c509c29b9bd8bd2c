"""The single trust scores, computed from the evidence of a case and the references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ensemble.trust.evidence import CaseEvidence
from ensemble.trust.reference import References

#: By score: whether a higher value is good (1) or bad (-1) for the mask.
DIRECTIONS = {
    "agreement": 1,
    "soft_dice": 1,
    "probability": 1,
    "weakest": 1,
    "entropy": -1,
    "boundary": -1,
    "volume_ml": 1,
    "lesions": -1,
    "spectral": -1,
    "spectral_lesion": -1,
    "rest": -1,
    "histogram": -1,
    "quality": -1,
    "mimicry": -1,
}
#: Distances are capped here; JSON has no infinite numbers.
_FARTHEST = 1e3


def compute_trust_scores(evidence: CaseEvidence, references: References) -> dict[str, float]:
    """Return the trust scores of a case that can be computed, by the names in `DIRECTIONS`.

    Distances are in units of the usual one. `spectral` and `spectral_lesion` are distances in the stable modes of the features of the brain
    and of the lesion, and `rest` is that outside the stable modes of the brain; each is the geometric mean over the members. `histogram`
    is the distance of the intensities; `quality` and `mimicry` are those of the most unusual trait of the images and of the lesions.
    Non-finite scores are left out.
    """
    scores = dict(evidence.mask)
    if evidence.agreement is not None:
        scores["agreement"] = evidence.agreement
    members = references.members
    whole = [members[name].whole.distance(x) for name, x in sorted(evidence.whole.items()) if name in members]
    rest = [members[name].whole.rest(x) for name, x in sorted(evidence.whole.items()) if name in members]
    lesion = [
        cloud.distance(x)
        for name, x in sorted(evidence.lesion.items())
        if name in members and (cloud := members[name].lesion) is not None
    ]
    for name, distances in (("spectral", whole), ("spectral_lesion", lesion), ("rest", rest)):
        if distances:
            scores[name] = _geometric_mean(distances)
    if references.images is not None:
        scores["histogram"] = min(references.images.distance(evidence.intensities), _FARTHEST)
        for name, (usual, found) in references.images.traits(evidence).items():
            scores[name] = min(usual.distance(found), _FARTHEST)
    return {name: scores[name] for name in DIRECTIONS if math.isfinite(scores.get(name, math.nan))}


def _geometric_mean(distances: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.clip(distances, 1 / _FARTHEST, _FARTHEST)))))
