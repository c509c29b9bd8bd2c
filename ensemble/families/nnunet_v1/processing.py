"""Pre- and postprocessing of SEALS, the ISLES'22 winner, on plain arrays and volumes.

As in DeepISLES: DWI and ADC are brought to 1 mm; then nnU-Net v1's GenericPreprocessor crops, resamples and normalises; the softmax comes
back through float16 and linear interpolation. Two faults of the original are mended: it breaks beyond 255 voxels along an axis (sizes
are cast to 8 bits), and it truncates the interpolated values of a DWI that is stored as integers.
"""

from __future__ import annotations

import numpy as np

from ensemble.families.cropping import CropResampleGeometry, bounding_box, nonzero_region
from ensemble.families.nnunet_v1.plans import NnunetV1Plans
from ensemble.geometry import Grid, Triple
from ensemble.resample import NnunetResampling, resample_volume
from ensemble.types import BoolArray, FloatArray
from ensemble.volume import Volume

SPACING_MM: Triple = (1.0, 1.0, 1.0)
#: Interpolation orders of nnU-Net v1 for images, and for the mask of non-zero voxels.
_IMAGES, _REGION = NnunetResampling(order=3), NnunetResampling(order=1)
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def grid_at_1mm(grid: Grid) -> Grid:
    """Return the grid with 1 mm voxels and the same first voxel centre; it does not extend beyond the given grid."""
    # written as DeepISLES does it: rounding decides about the last voxel
    x, y, z = (max(1, int(n / (new / old))) for n, new, old in zip(grid.size, SPACING_MM, grid.spacing_mm, strict=True))
    return Grid((x, y, z), SPACING_MM, grid.origin_mm, grid.direction)


def preprocess(images: FloatArray, plans: NnunetV1Plans) -> tuple[FloatArray, CropResampleGeometry]:
    """Crop, resample and normalise images (channels, z, y, x; at 1 mm), in the network's axis order. Also return the geometry.

    Returns the float32 array (channels, a, b, c) and the way back. nnU-Net v1 resamples first, then normalises.
    """
    order = plans.transpose_forward
    transposed = images.transpose(0, *[axis + 1 for axis in order])
    region = nonzero_region(transposed)
    box = bounding_box(region)
    placement = CropResampleGeometry(region.shape, box, SPACING_MM, plans.spacing_mm, order)
    array = placement.to_network(transposed[:, *box].astype(np.float32), _IMAGES)
    inside = placement.to_network(region[None, *box].astype(np.float32), _REGION)[0] >= 0.5
    for channel, scaled, masked in zip(array, plans.normalise, plans.use_mask, strict=True):
        if scaled:
            _normalise(channel, inside if masked else None)
    return array, placement


def _normalise(image: FloatArray, region: BoolArray | None) -> None:
    """Normalise (a, b, c) to zero mean and unit deviation in place; within the region if given, 0 outside it."""
    where = slice(None) if region is None else region
    values = image[where]
    image[where] = (values - values.mean()) / (values.std() + np.float32(1e-8))
    if region is not None:
        image[~region] = 0


def postprocess(
    softmax: FloatArray, placement: CropResampleGeometry, plans: NnunetV1Plans, fine: Grid, grid: Grid
) -> FloatArray:
    """Resample a network's softmax (2, a, b, c) to the image's grid: background and lesion (2, z, y, x) float32.

    `fine` is the grid at 1 mm. Outside of what the network saw all is background; beyond `fine`, both are 0.
    """
    half = placement.from_network(softmax, plans.resample_softmax).astype(np.float16).astype(np.float32)
    whole = (placement.paste(half[0], outside=1), placement.paste(half[1]))
    # both grids start at the same voxel and run the same way, so directions do not matter, and their rounding does no harm
    there, here = _upright(fine), _upright(grid)
    return np.stack([resample_volume(Volume(array, there), here).array for array in whole])


def _upright(grid: Grid) -> Grid:
    return Grid(grid.size, grid.spacing_mm, (0.0, 0.0, 0.0), _IDENTITY)
