"""Compute an ADC map if none was given, from the DWI and the image of lowest b-value beside it.

S = S0 exp(-b D) (Le Bihan 1986): of two b-values, D = ln(S_low / S) / (b - b_low). The DWI is the geometric mean over directions, so that D
is the mean of theirs, as scanners compute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy import ndimage

from ensemble.prepare.brain import above_background
from ensemble.readers.b_values import missing_adc_error
from ensemble.readers.base import LowBImage, RawCase, RawImage
from ensemble.types import BoolArray, FloatArray, Modality

#: Largest ADC, in 1e-6 mm^2/s: free water at 37 degrees has 3000.
MAX_ADC = 4000.0
#: Corners of a slice in which there is air, as a share of its edges; Rayleigh's median in units of sigma (sqrt(2 ln 2)).
_CORNER, _RAYLEIGH_MEDIAN = 0.1, 1.1774
#: Signals, smoothed over 3 x 3 voxels, that are none of air, in units of its sigma: the mean of air is 1.25, its scatter then 0.22.
_ABOVE_NOISE = 2.5


def compute_missing_adc(raw: RawCase) -> RawCase:
    """Return the case with a computed ADC if it has none; unchanged if one was given.

    Raises InputRefused if none can be computed.
    """
    dwi = raw.images.get(Modality.DWI)
    if Modality.ADC in raw.images or dwi is None:
        return raw
    if dwi.low_b is None:
        raise missing_adc_error(dwi.path, "no image of low b-value")
    low = dwi.low_b
    note = (
        f"ADC: computed from b = {low.b:.4g} and b = {low.dwi_b:.4g} s/mm^2 of the DWI, because none was given"
        f" (ln(S_low / S) / {low.dwi_b - low.b:.4g}); 0 where the signal does not exceed the noise"
    )
    adc = RawImage(dwi.path, dwi.volume.like(_adc(dwi.volume.array, low)), (note,))
    images: Mapping[Modality, RawImage] = {**raw.images, Modality.ADC: adc}
    return replace(raw, images={modality: images[modality] for modality in Modality if modality in images})


def _adc(dwi: FloatArray, low: LowBImage) -> FloatArray:
    """Return ADC (z, y, x) in 1e-6 mm^2/s: 0 in air and without signal, NaN if a signal is not finite."""
    signal = _above_noise(low.array) & (dwi > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(low.array.astype(np.float64) / dwi) / (low.dwi_b - low.b) * 1e6
    adc = np.where(signal, np.clip(ratio, 0, MAX_ADC), 0)
    adc[~np.isfinite(low.array) | ~np.isfinite(dwi)] = np.nan
    return adc.astype(np.float32)


def _above_noise(image: FloatArray) -> BoolArray:
    """Return where an image (z, y, x) exceeds the noise level of the air in its corners."""
    finite = np.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)
    rows, columns = (max(1, int(_CORNER * n)) for n in finite.shape[1:])
    corners = np.concatenate(
        [
            finite[:, y, x].ravel()
            for y in (slice(rows), slice(-rows, None))
            for x in (slice(columns), slice(-columns, None))
        ]
    )
    sigma = float(np.median(corners)) / _RAYLEIGH_MEDIAN
    smooth = ndimage.uniform_filter(finite, (0, 3, 3))
    return above_background(finite) & ((smooth > _ABOVE_NOISE * sigma) | (finite > 2 * _ABOVE_NOISE * sigma))
