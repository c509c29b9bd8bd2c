"""Mask and images in the template's space, on its published grid of 1 mm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.findings.registration import affine_transform
from ensemble.findings.template import FULL_GRID
from ensemble.resample import resample_volume
from ensemble.types import FloatArray
from ensemble.volume import Volume


def image_in_mni(image: Volume, matrix: Sequence[Sequence[float]]) -> Volume:
    """Return an image (linear, float32; 0 beyond its field of view) on the template's grid; `matrix` (4x4, LPS) brings points there."""
    back = np.linalg.inv(np.array(matrix))
    return resample_volume(image, FULL_GRID, transform=affine_transform(back))


def mask_in_mni(mask: Volume, matrix: Sequence[Sequence[float]]) -> Volume:
    """Return a mask on the template's grid: bool, where half or more of it lies."""
    share: FloatArray = image_in_mni(mask, matrix).array
    return Volume(share >= 0.5, FULL_GRID)
