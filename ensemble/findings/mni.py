"""Resample mask and images to the template's published 1 mm grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.findings.registration import to_sitk_transform
from ensemble.findings.template import FULL_GRID
from ensemble.resample import resample_volume
from ensemble.types import FloatArray
from ensemble.volume import Volume


def resample_image_to_mni(image: Volume, matrix: Sequence[Sequence[float]]) -> Volume:
    """Resample an image to the template's grid (linear, float32; 0 outside). `matrix` (4x4, LPS) maps image points to template points."""
    back = np.linalg.inv(np.array(matrix))
    return resample_volume(image, FULL_GRID, transform=to_sitk_transform(back))


def resample_mask_to_mni(mask: Volume, matrix: Sequence[Sequence[float]]) -> Volume:
    """Resample a mask to the template's grid: bool, true where at least half a voxel is lesion."""
    share: FloatArray = resample_image_to_mni(mask, matrix).array
    return Volume(share >= 0.5, FULL_GRID)
