"""Lesion volume and number, and the ISLES'22 measures of agreement between two masks.

Definitions as in the ISLES'22 challenge's evaluation (Hernandez Petzsche et al., Scientific Data 2022; github.com/ezequieldlrosa/isles22):
lesions are 26-connected components; a true lesion counts as found when any predicted voxel touches it, and a predicted lesion
as false when it touches none; two empty masks agree perfectly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import numpy as np
from scipy import ndimage

from ensemble.types import AnyArray

_CONNECTED_26 = np.ones((3, 3, 3), dtype=bool)


def lesion_components(mask: AnyArray) -> tuple[AnyArray, int]:
    """Label the 26-connected components of a mask (z, y, x): an integer array (0 outside), and their number."""
    labels, count = ndimage.label(mask, _CONNECTED_26)
    return labels, int(count)


def lesion_count(mask: AnyArray) -> int:
    """Return the number of lesions in a mask (z, y, x)."""
    return lesion_components(mask)[1]


def volume_ml(mask: AnyArray, spacing_zyx_mm: tuple[float, float, float]) -> float:
    """Return the volume of a mask in millilitres."""
    return float(np.count_nonzero(mask) * np.prod(spacing_zyx_mm) / 1000.0)


def dice(truth: AnyArray, prediction: AnyArray) -> float:
    """Return the Dice coefficient of two masks (z, y, x); 1 when both are empty."""
    truth, prediction = truth.astype(bool), prediction.astype(bool)
    total = int(truth.sum()) + int(prediction.sum())
    return 2.0 * int((truth & prediction).sum()) / total if total else 1.0


def pairwise_dice(masks: Sequence[AnyArray]) -> float | None:
    """Return the mean Dice over all pairs of masks (z, y, x): 1 if all are empty, None for fewer than two masks."""
    return mean(dice(one, other) for one, other in combinations(masks, 2)) if len(masks) > 1 else None


def detected_lesions(truth: AnyArray, prediction: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Return for each lesion of the first mask its voxel count, and whether the second mask overlaps it (bool): two arrays (lesions,)."""
    labels, count = lesion_components(truth)
    voxels = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    touched = np.bincount(labels[prediction.astype(bool)], minlength=count + 1)[1:]
    return voxels, touched > 0


def lesion_f1(truth: AnyArray, prediction: AnyArray) -> float:
    """Return the F1 score of lesion detection; 1 when both masks are empty."""
    found, confirmed = detected_lesions(truth, prediction)[1], detected_lesions(prediction, truth)[1]
    if len(found) + len(confirmed) == 0:
        return 1.0
    hits, missed, false = int(found.sum()), int((~found).sum()), int((~confirmed).sum())
    return 2.0 * hits / (2.0 * hits + false + missed)


def absolute_volume_difference_ml(
    truth: AnyArray, prediction: AnyArray, spacing_zyx_mm: tuple[float, float, float]
) -> float:
    """Return the absolute difference of lesion volumes, in millilitres."""
    return abs(volume_ml(truth, spacing_zyx_mm) - volume_ml(prediction, spacing_zyx_mm))


def absolute_lesion_count_difference(truth: AnyArray, prediction: AnyArray) -> int:
    """Return the absolute difference of the numbers of lesions."""
    return abs(lesion_count(truth) - lesion_count(prediction))
