"""A skull around an extracted brain: what a scanner shows before anyone has stripped it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ensemble.prepare.plausibility import tissue_level
from ensemble.types import AnyArray, BoolArray

#: Layers around the brain: how far out they reach (mm), DWI and ADC in units of normal tissue (CSF, bone, fat-suppressed scalp).
LAYERS = ((2.5, 0.35, 3.5), (9.0, 0.03, 0.3), (15.0, 0.3, 1.5))
#: Magnitude noise of air, in units of normal tissue.
NOISE = 0.04


def with_skull(
    dwi: AnyArray, adc: AnyArray, brain: BoolArray, spacing_zyx_mm: tuple[float, float, float], *, noise: bool = True
) -> tuple[AnyArray, AnyArray]:
    """DWI and ADC (z, y, x) of the same head with CSF, bone and scalp around the brain; in noisy air, or in air that is 0."""
    draw = np.random.default_rng(5)
    distance = ndimage.distance_transform_edt(~brain, spacing_zyx_mm)
    head_dwi, head_adc = np.where(brain, dwi, 0), np.where(brain, adc, 0)
    inner = 0.0
    for outer, weighted, diffusion in LAYERS:
        layer = (distance > inner) & (distance <= outer)
        texture = 1 + 0.15 * draw.standard_normal(int(layer.sum()))
        head_dwi[layer] = weighted * tissue_level(dwi, brain) * texture
        head_adc[layer] = diffusion * tissue_level(adc, brain) * texture
        inner = outer
    if noise:
        sigma = NOISE * tissue_level(dwi, brain)
        real, imaginary = sigma * draw.standard_normal((2, *dwi.shape))
        head_dwi = np.hypot(head_dwi + real, imaginary)
        air = distance > inner
        head_adc[air] = np.abs(2 * tissue_level(adc, brain) * draw.standard_normal(int(air.sum())))
    return head_dwi.astype(np.float32), head_adc.astype(np.float32)
