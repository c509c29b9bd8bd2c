"""Measure a predicted mask against the true one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.evaluate.pairs import MaskPair
from ensemble.geometry import ROUNDING_VOXELS
from ensemble.metrics import detected_lesions, dice, lesion_f1, volume_ml
from ensemble.readers.stored import not_3d_error, read_stored
from ensemble.volume import Volume

#: Share of an image that a lesion may fill.
_MAX_SHARE_OF_IMAGE = 0.5
#: The measures of ISLES'22.
MEASURES = ("dice", "lesion_f1", "avd_ml", "alcd")
#: Of these a few large lesions make up the mean.
SKEWED = ("avd_ml",)


@dataclass(frozen=True)
class Score:
    """The ISLES'22 measures of one case."""

    case: str
    dice: float
    lesion_f1: float
    avd_ml: float
    """Absolute volume difference."""
    alcd: int
    """Absolute lesion count difference."""
    truth_ml: float
    predicted_ml: float
    truth_lesions: int
    predicted_lesions: int
    missed_lesions: int
    false_lesions: int
    lesions_ml: tuple[float, ...]
    """Volume of each true lesion."""
    lesions_found: tuple[bool, ...]
    """Whether any voxel of it is predicted."""


def score_pair(pair: MaskPair) -> Score:
    """Measure one pair. Raises InputRefused if a mask is missing, ambiguous, unreadable or not a mask, or if the grids differ."""
    truth, prediction = _only_two(pair)
    true, predicted = read_mask(truth, "true mask"), read_mask(prediction, "predicted mask")
    if not true.grid.distance_voxels(predicted.grid) <= ROUNDING_VOXELS:
        raise InputRefused(
            "the two masks have different grids",
            where=prediction,
            found=f"predicted {predicted.grid.size} at {_mm(predicted)}, true {true.grid.size} at {_mm(true)}; positions"
            f" {true.grid.distance_voxels(predicted.grid):.3g} voxels apart",
            do="resample the predicted mask to the grid of the true mask; evaluate does not resample",
        )
    return score_masks(pair.case, true.array, predicted.array, true.grid.spacing_zyx_mm)


def score_masks(
    case: str, truth: np.ndarray, prediction: np.ndarray, spacing_zyx_mm: tuple[float, float, float]
) -> Score:
    """Measure two boolean masks (z, y, x) of the same shape."""
    voxels, found = detected_lesions(truth, prediction)
    predicted_voxels, confirmed = detected_lesions(prediction, truth)
    true_ml, predicted_ml = volume_ml(truth, spacing_zyx_mm), volume_ml(prediction, spacing_zyx_mm)
    return Score(
        case=case,
        dice=dice(truth, prediction),
        lesion_f1=lesion_f1(truth, prediction),
        avd_ml=abs(true_ml - predicted_ml),
        alcd=abs(len(voxels) - len(predicted_voxels)),
        truth_ml=true_ml,
        predicted_ml=predicted_ml,
        truth_lesions=len(voxels),
        predicted_lesions=len(predicted_voxels),
        missed_lesions=int((~found).sum()),
        false_lesions=int((~confirmed).sum()),
        lesions_ml=tuple((voxels * np.prod(spacing_zyx_mm) / 1000.0).tolist()),
        lesions_found=tuple(found.tolist()),
    )


def read_mask(path: Path, label: str) -> Volume:
    """Read a mask file as bool.

    Raises InputRefused for a file that can't be read completely, or has stored values other than 0 and one other.
    """
    stored = read_stored(path, label)
    values = stored.values(np.float64) if stored.scale != (1.0, 0.0) else stored.array
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3:
        raise not_3d_error(path, label, values.shape[::-1])
    found = np.unique(values)
    if len(found) > 2 or not np.isfinite(found).all() or found[0] < 0 or (len(found) == 2 and found[0] != 0):
        finite = found[np.isfinite(found)]
        numbers = f"between {finite[0]:g} and {finite[-1]:g}" if len(finite) else "none of them a number"
        odd = int((~np.isfinite(values)).sum())
        raise InputRefused(
            f"the {label} is not a binary mask",
            where=path,
            found=f"{len(found)} different values, {numbers}" + f", {odd} voxels NaN or infinite" * bool(odd),
            do="use 0 outside the lesion and one other value inside",
        )
    mask = values != 0
    if (share := float(mask.mean())) > _MAX_SHARE_OF_IMAGE:
        raise InputRefused(
            f"the {label} can't be a lesion mask",
            where=path,
            found=f"the mask covers {share:.0%} of the image, at most {_MAX_SHARE_OF_IMAGE:.0%} is accepted",
            do="use 0 outside the lesion and one other value inside; the mask may be inverted",
        )
    return Volume(mask, stored.grid)


def _only_two(pair: MaskPair) -> tuple[Path, Path]:
    if not pair.predictions:
        raise InputRefused(
            f"case {pair.case} has no predicted mask",
            where=pair.truth[0],
            found=f"predicted masks without a true mask: {', '.join(map(str, pair.others))}"
            if pair.others
            else "no unmatched predicted mask has a similar name",
            do="give both masks the same name (or sub, ses and run), segment the case, or remove its true mask",
        )
    if len(pair.truth) > 1 or len(pair.predictions) > 1:
        raise InputRefused(
            f"case {pair.case} has more than one {'true' if len(pair.truth) > 1 else 'predicted'} mask",
            found=f"true: {', '.join(map(str, pair.truth))}; predicted: {', '.join(map(str, pair.predictions))}",
            do="keep exactly one of each, or give them different case names",
        )
    return pair.truth[0], pair.predictions[0]


def _mm(volume: Volume) -> str:
    return " x ".join(f"{mm:.4g}" for mm in volume.grid.spacing_mm) + " mm"
