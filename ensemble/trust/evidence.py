"""Collect from a segmented case all that its trust scores are computed from, before comparison with other cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from ensemble.metrics import lesion_components, pairwise_dice
from ensemble.pipeline import Result
from ensemble.trust.quality import measure_image_quality, measure_lesion_traits
from ensemble.types import BoolArray, FloatArray, Modality

#: Quantiles by which a histogram is represented. One per cent at either end is left out, since single voxels determine it.
QUANTILES = np.linspace(0.01, 0.99, 50)
#: Images whose histograms are compared; every case has them.
COMPARED = (Modality.DWI, Modality.ADC)


@dataclass(frozen=True)
class CaseEvidence:
    """Measurements of one segmented case, made without a true mask, by which the trust in its mask is judged."""

    agreement: float | None
    """Mean pairwise Dice of the voters' masks; None for a single voter."""
    mask: Mapping[str, float]
    """`volume_ml`, `lesions`, and of a mask that is not empty: `probability` and `entropy` (bits) of the mean probability in it,
    `weakest` (mean probability of the lesion that is least sure), `boundary` (share of its voxels at the rim) and `soft_dice` (the Dice to
    be expected if each voxel's mean probability were right)."""
    whole: Mapping[str, FloatArray]
    """By member that exposes features: its features (D,) averaged over the brain."""
    lesion: Mapping[str, FloatArray]
    """By member that found a lesion: its features (D,) averaged over its lesions."""
    intensities: Mapping[str, FloatArray]
    """By image: the `QUANTILES` (50,) of its values in the brain; normal tissue is 1."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """Measurements of the images (`quality.IMAGES`)."""
    surroundings: Mapping[str, float] = field(default_factory=dict)
    """Measurements of the lesions and the tissue around them (`quality.LESIONS`); empty for an empty mask."""

    @property
    def empty(self) -> bool:
        """Whether the mask is empty."""
        return self.mask["volume_ml"] == 0


def gather_evidence(result: Result) -> CaseEvidence:
    """Collect the evidence of a segmented case."""
    predictions = [outcome.prediction for outcome in result.outcomes if outcome.prediction is not None]
    features = {p.member: p.features for p in predictions if p.features is not None}
    brain = result.case.brain.array
    return CaseEvidence(
        pairwise_dice([prediction.mask.array for prediction in predictions]),
        {"volume_ml": result.lesion_ml, "lesions": float(result.lesion_count)}
        | measure_mask(result.fused.mask.array, result.fused.mean.array),
        {member: found.whole for member, found in features.items()},
        {member: found.foreground for member, found in features.items() if found.foreground is not None},
        {m.value: intensity_quantiles(result.case.tissue_normalized[m].array[brain]) for m in COMPARED},
        measure_image_quality(result.case),
        measure_lesion_traits(result.case, result.fused.mask.array),
    )


def measure_mask(mask: BoolArray, probability: FloatArray) -> dict[str, float]:
    """Return statistics of a mask (z, y, x) and the mean probability (see `CaseEvidence.mask`); empty for an empty mask."""
    if not mask.any():
        return {}
    labels, count = lesion_components(mask)
    inside = np.clip(probability[mask].astype(np.float64), 1e-6, 1 - 1e-6)
    sizes = np.bincount(labels[mask], minlength=count + 1)[1:]
    sums = np.bincount(labels[mask], weights=inside, minlength=count + 1)[1:]
    core = ndimage.binary_erosion(mask, ndimage.generate_binary_structure(3, 1))
    return {
        "probability": float(inside.mean()),
        "entropy": float(-(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside)).mean()),
        "weakest": float((sums / sizes).min()),
        "boundary": 1 - float(core.sum() / mask.sum()),
        "soft_dice": float(2 * inside.sum() / (probability.sum(dtype=np.float64) + mask.sum())),
    }


def intensity_quantiles(values: FloatArray) -> FloatArray:
    """Return the `QUANTILES` of values, (50,) float32; 0 if there are no values."""
    return np.quantile(values, QUANTILES).astype(np.float32) if values.size else np.zeros(len(QUANTILES), np.float32)
