"""Positions and weights of the windows of sliding-window inference.

Formulas: nnU-Net (Isensee et al., Nature Methods 2021), `compute_steps_for_sliding_window` and `compute_gaussian`; MONAI 0.9 (Cardoso et
al., 2022), `dense_patch_slices` and `compute_importance_map`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import product
from math import ceil, erf

import numpy as np

from ensemble.types import FloatArray

Shape = tuple[int, int, int]


class TilingConvention(Enum):
    """Which program's rule, nnU-Net's or MONAI's, determines positions and weights of windows."""

    NNUNET = "nnunet"
    """Windows spread evenly; a sampled Gaussian, with its smallest weight beyond four sigma."""
    MONAI = "monai"
    """Windows at whole steps, the last one moved back to the image's end; the Gaussian integrated over each voxel, at least 0.001."""


@dataclass(frozen=True)
class Blending:
    """How far windows overlap, and how their voxels are weighted."""

    step: float = 0.5
    """Distance of neighbouring windows, at most this fraction of the window (never less than a voxel)."""
    sigma: float | None = 0.125
    """Standard deviation of the Gaussian weights as a fraction of the window; None: all voxels count alike."""
    convention: TilingConvention = TilingConvention.NNUNET

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step {self.step} is not in (0, 1]")
        if self.sigma is not None and not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma {self.sigma} is no width")

    def starts(self, length: int, window: int) -> list[int]:
        """Return the first voxels of the windows along one axis (length >= window)."""
        if self.convention is TilingConvention.NNUNET:
            return window_starts(length, window, self.step)
        last, step = length - window, max(1, int(window * self.step))
        return [*range(0, last, step), last]

    def weights(self, window: Shape) -> FloatArray:
        """Return the weight of each voxel (z, y, x) of a window, float32; the largest is 1."""
        if self.sigma is None:
            return np.ones(window, np.float32)
        if self.convention is TilingConvention.NNUNET:
            return gaussian_importance(window, self.sigma)
        return _integrated_gaussian(window, self.sigma)


#: As nnU-Net of either version does it.
NNUNET = Blending()


@dataclass(frozen=True)
class Tiling:
    """Windows of one size that cover an image, which is padded if it is smaller than a window."""

    image: Shape
    """Voxels of the image along z, y, x."""
    window: Shape
    """Voxels of a window along z, y, x; 1 along z for 2-D networks."""
    blending: Blending = NNUNET

    def __post_init__(self) -> None:
        if min(self.image) < 1 or min(self.window) < 1:
            raise ValueError(f"image {self.image} or window {self.window} is empty")

    @property
    def padded(self) -> Shape:
        """Shape (z, y, x) of the image after padding."""
        z, y, x = (max(pair) for pair in zip(self.image, self.window, strict=True))
        return z, y, x

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after the image along z, y, x; an odd voxel is added after."""
        missing = [padded - n for padded, n in zip(self.padded, self.image, strict=True)]
        return tuple((n // 2, n - n // 2) for n in missing)

    @property
    def inside(self) -> tuple[slice, slice, slice]:
        """The slices of the image within the padded image."""
        z, y, x = (slice(before, before + n) for (before, _), n in zip(self.padding, self.image, strict=True))
        return z, y, x

    def windows(self) -> list[tuple[slice, slice, slice]]:
        """Return every window as slices (z, y, x) of the padded image, x fastest."""
        starts = [self.blending.starts(padded, window) for padded, window in zip(self.padded, self.window, strict=True)]
        z, y, x = self.window
        return [(slice(i, i + z), slice(j, j + y), slice(k, k + x)) for i, j, k in product(*starts)]


def window_starts(length: int, window: int, step: float) -> list[int]:
    """Return the first voxels of windows along one axis (length >= window), evenly spread; the last window ends at the image's end."""
    last = length - window
    gaps = ceil(last / max(1.0, window * step))
    return [0] if gaps == 0 else [int(np.round(last / gaps * i)) for i in range(gaps + 1)]


def gaussian_importance(window: Shape, sigma: float = 0.125) -> FloatArray:
    """Return nnU-Net's weight of each voxel (z, y, x) of a window, float32: a Gaussian of sigma * window about voxel window // 2.

    The maximum is 1. Voxels that lie beyond the filter's reach of four sigma get the smallest positive weight.
    """
    from scipy.ndimage import gaussian_filter1d

    # the Gaussian is separable: the outer product of three lines
    lines = []
    for length in window:
        line = np.zeros(length)
        line[length // 2] = 1
        lines.append(gaussian_filter1d(line, length * sigma, mode="constant"))
    z, y, x = lines
    weights = z[:, None, None] * y[:, None] * x
    weights = (weights / weights.max()).astype(np.float32)
    return np.where(weights > 0, weights, weights[weights > 0].min())


def _integrated_gaussian(window: Shape, sigma: float) -> FloatArray:
    """Return MONAI's weight of each voxel (z, y, x) of a window, float32."""
    lines = []
    for length in window:
        apart = np.abs(np.arange(length) - length // 2)
        scale = 0.70710678 / np.float32(length * sigma)
        line = 0.5 * np.array([erf(scale * (x + 0.5)) - erf(scale * (x - 0.5)) for x in apart])
        reach = int(max(length * sigma * 4.0, 0.5) + 0.5)
        lines.append(np.where(apart <= reach, line, 0))
    z, y, x = lines
    weights = z[:, None, None] * y[:, None] * x
    weights = (weights / weights.max()).astype(np.float32)
    return np.maximum(weights, np.float32(1e-3))
