"""Find values that are impossible in a head: one voxel of 2^32 would spoil every maximum, mean and standard deviation."""

from __future__ import annotations

import numpy as np

from ensemble.types import AnyArray, BoolArray

#: Times the 98th percentile of what is positive: beyond, nothing is tissue (the brightest voxel of real DWI, ADC and FLAIR: 1.1 to 4.3).
_HOT = 20.0
#: Share of an image that may be so hot; a brain, in the widest field of view, is a larger one.
_FEW = 0.005
#: Share of an image that must differ from the rest, or it is constant.
_MIN_PICTURE = 1e-4


def highest_plausible_value(image: AnyArray) -> float:
    """Return the largest plausible magnitude in an image (z, y, x); infinite if no value is positive."""
    values = image[np.isfinite(image) & (image > 0)]
    while values.size:
        limit = _HOT * float(np.percentile(values, 98))
        beyond = values > limit
        if np.count_nonzero(beyond) <= _FEW * image.size:
            return limit
        values = values[beyond]  # the values so far are resampling noise (1e-22); the image is above it
    return float("inf")


def unusable_voxel_mask(image: AnyArray) -> BoolArray:
    """Return where an image (z, y, x) is not finite or has impossible values."""
    return ~(np.abs(image) <= min(highest_plausible_value(image), float(np.finfo(np.float32).max)))


def is_constant(image: AnyArray, usable: BoolArray) -> bool:
    """Return whether an image (z, y, x) has a single value, apart from a few voxels."""
    values = image[usable]
    return bool(np.count_nonzero(values != np.median(values)) < max(1.0, _MIN_PICTURE * image.size))
