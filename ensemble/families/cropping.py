"""The crop of an image that an nnU-Net (v1 or v2) processes, and the way back from the network's grid to the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import Triple, describe_size_limit, is_too_large
from ensemble.resample import NnunetResampling
from ensemble.types import BoolArray, FloatArray

Box = tuple[slice, slice, slice]
#: Voxels that networks go over: some 5 GB with images and answers (docs/architecture.md). Half a millimetre is within it.
MAX_NETWORK_VOXELS = 64_000_000


@dataclass(frozen=True)
class CropResampleGeometry:
    """Maps between an image's grid and the network's: crop, axis order and spacing."""

    shape: tuple[int, int, int]
    """Of the whole image in the network's axis order."""
    box: Box
    """The part of it that the network saw."""
    spacing_mm: Triple
    """Of the image, in the network's axis order."""
    network_spacing_mm: Triple
    """That the network works at."""
    transpose_forward: tuple[int, int, int]
    """The image's axis that became the network's first, second, third one."""

    @property
    def network_shape(self) -> tuple[int, int, int]:
        """Shape of the crop at the network's spacing."""
        z, y, x = (
            max(1, round(old / new * (part.stop - part.start)))
            for old, new, part in zip(self.spacing_mm, self.network_spacing_mm, self.box, strict=True)
        )
        return z, y, x

    def to_network(self, array: FloatArray, how: NnunetResampling) -> FloatArray:
        """Resample a crop (channels, a, b, c) to the network's spacing.

        Raises InputRefused if that is larger than any brain.
        """
        if is_too_large(shape := self.network_shape, MAX_NETWORK_VOXELS):
            spacing = " x ".join(f"{mm:.3g}" for mm in self.network_spacing_mm)
            raise InputRefused(
                "the image is too large at the voxel size of a member",
                found=f"{' x '.join(map(str, shape))} voxels of {spacing} mm; {describe_size_limit(MAX_NETWORK_VOXELS)}",
                do="check that its header is in mm and that it shows one head; or run only the other members (--members A,B)",
            )
        return how.resize(array, self.network_shape, self.spacing_mm, self.network_spacing_mm)

    def from_network(self, array: FloatArray, how: NnunetResampling) -> FloatArray:
        """Resample an array (channels, a, b, c) from the network's spacing to the image's; still only the crop."""
        shape = [part.stop - part.start for part in self.box]
        return how.resize(array, shape, self.network_spacing_mm, self.spacing_mm)

    def paste(self, probability: FloatArray, outside: float = 0.0) -> FloatArray:
        """Return a probability of the crop as an array (z, y, x) of the whole image, filled with `outside` elsewhere."""
        whole = np.full(self.shape, outside, probability.dtype)
        whole[self.box] = probability
        return whole.transpose(np.argsort(self.transpose_forward))


def nonzero_region(images: FloatArray) -> BoolArray:
    """Return where any channel of (channels, z, y, x) is nonzero, with holes filled in 3-D."""
    from scipy.ndimage import binary_fill_holes

    filled: BoolArray = binary_fill_holes((images != 0).any(axis=0))
    return filled


def bounding_box(region: BoolArray) -> Box:
    """Return the bounding box of a region; the whole array if it is empty."""
    if not region.any():
        region = np.ones_like(region)
    z, y, x = (np.flatnonzero(region.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    return slice(z[0], z[-1] + 1), slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
