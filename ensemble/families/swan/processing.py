"""SWAN's pre- and postprocessing as in DeepISLES, on plain arrays.

Each image is normalised where it is not 0, at its own resolution; then all are brought to 2 mm by trilinear interpolation, which is laid
out by sizes, not by spacings, and left out where voxels have 2 mm already. Axes are (x, y, z), as the networks know them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from ensemble.errors import InputRefused
from ensemble.families.cropping import MAX_NETWORK_VOXELS
from ensemble.families.swan.checkpoints import SPACING_MM
from ensemble.geometry import Grid, describe_size_limit, is_too_large
from ensemble.types import FloatArray

_JUST_ABOVE_HALF = np.nextafter(np.float32(0.5), np.float32(1))


def preprocess(images: Sequence[FloatArray], grid: Grid) -> torch.Tensor:
    """Resample and normalise images (z, y, x) on a grid for the networks: (channels, x, y, z) float32.

    Raises InputRefused if the grid has too many voxels at 2 mm.
    """
    size = network_size(grid)
    if is_too_large(size, MAX_NETWORK_VOXELS):
        raise InputRefused(
            "the image is too large at the voxel size of a member",
            found=f"{' x '.join(map(str, size))} voxels of 2 mm; {describe_size_limit(MAX_NETWORK_VOXELS)}",
            do="check that its header is in mm and that it shows one head; or exclude the member (--members)",
        )
    normalised = np.stack([_normalised(image.transpose()) for image in images])
    return _resized(torch.from_numpy(normalised), size)


def postprocess(logits: torch.Tensor, grid: Grid) -> FloatArray:
    """Return the probability (z, y, x) float32 on the grid, from the networks' lesion logits (x, y, z).

    It is above 0.5 exactly where the logit is not negative, which is DeepISLES' mask.
    """
    whole = _resized(logits[None].float().cpu(), grid.size)[0].numpy().transpose()
    probability = 1 / (1 + np.exp(-np.clip(whole, -80, 80)))
    return np.where(whole >= 0, np.maximum(probability, _JUST_ABOVE_HALF), np.minimum(probability, np.float32(0.5)))


def network_size(grid: Grid) -> tuple[int, int, int]:
    """Return the size (x, y, z) of a grid at 2 mm."""
    spacing = np.asarray(grid.spacing_mm, np.float32)
    if np.allclose(spacing, SPACING_MM):
        return grid.size
    scaled = np.asarray(grid.size, np.float32) * spacing / np.asarray(SPACING_MM, np.float32)
    x, y, z = (max(1, int(n)) for n in np.round(scaled))
    return x, y, z


def _normalised(image: FloatArray) -> FloatArray:
    """Scale to zero mean and unit deviation over nonzero voxels; zeros stay 0."""
    array = np.array(image, np.float32, order="C")
    where = array != 0
    if where.any():
        values = array[where]
        array[where] = (values - values.mean()) / (values.std() or np.float32(1))
    return array


def _resized(array: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize (channels, x, y, z); voxel edges are aligned, without an anti-aliasing filter."""
    if tuple(array.shape[1:]) == tuple(size):
        return array
    return functional.interpolate(array[None], size=tuple(size), mode="trilinear", align_corners=False)[0]
