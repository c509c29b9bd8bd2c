"""Find the brain in a case that is already skull-stripped (`skull.py` strips the others)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ensemble.prepare.hot_voxels import highest_plausible_value

# Fraction of the typical foreground value below which a voxel is background: far above resampling noise (1e-22 ... 1e-6)
# and the overshoot of cubic interpolation at the mask's edge, far below cerebrospinal fluid on a b = 1000 s/mm^2 image (0.2-0.5).
BACKGROUND_FRACTION = 0.04
# A piece of foreground is kept when it has at least this share of the largest one: temporal poles and cerebellum may hang on by
# nothing after skull stripping; smaller pieces (about 1 ml) are residues of skull stripping.
KEPT_SHARE = 1e-3


def brain_mask(dwi: npt.NDArray[np.floating], adc: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Return the foreground of a skull-stripped case: voxels above background in DWI or ADC, without small pieces, holes filled.

    Args:
        dwi, adc: arrays (z, y, x) on one grid, in any unit; the background may hold noise, small or negative values.

    Returns:
        Boolean array (z, y, x); all False where both images are empty.
    """
    foreground = above_background(dwi) | above_background(adc)
    components, count = ndimage.label(foreground, np.ones((3, 3, 3), dtype=bool))
    if count == 0:
        return np.zeros(dwi.shape, dtype=bool)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept = (sizes >= KEPT_SHARE * sizes.max())[components] & foreground
    filled = ndimage.binary_fill_holes(kept)
    return np.asarray(filled, dtype=bool)


def above_background(image: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Return where an image (z, y, x) exceeds a small fraction of its typical value, and so is more than resampling noise."""
    finite = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    peak = min(float(finite.max(initial=0.0)), highest_plausible_value(finite))
    if peak <= 0.0:
        return np.zeros(finite.shape, dtype=bool)
    # in three steps, so that no hot spot counts: without resampling noise and faint values (noise of the air), the median is that of tissue
    signal = finite[finite > 1e-3 * peak]
    typical = float(np.median(signal[signal > 0.1 * np.percentile(signal, 99)]))
    return finite > BACKGROUND_FRACTION * typical
