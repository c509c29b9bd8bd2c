"""A volume, i.e. an array with its grid, and the only conversion between the axis orders of SimpleITK and numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.types import AnyArray, FloatArray

if TYPE_CHECKING:
    import SimpleITK as sitk


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image: array (z, y, x) and the grid it lies on. Treated as immutable."""

    array: AnyArray
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape_zyx:
            raise ValueError(f"array of shape {self.array.shape} on a grid of shape {self.grid.shape_zyx}")

    @classmethod
    def from_numpy(cls, array: ArrayLike, affine: ArrayLike) -> Volume:
        """Make a volume from an array (x, y, z) and its affine (RAS), as in nibabel.

        `array` is (x, y, z). `affine` (4, 4) leads from voxel indices (x, y, z) to world positions in mm, RAS. Values are not copied.
        Raises InputRefused when the array is not 3-D or not of real numbers, or when the affine names no place in the world.
        """
        voxels, matrix = np.asarray(array), np.asarray(affine, dtype=np.float64)
        if voxels.ndim != 3 or voxels.size == 0 or voxels.dtype.kind not in "buif":
            found = f"shape {voxels.shape}, type {voxels.dtype}"
            raise InputRefused(
                "the array is not a 3-D image of real numbers", found=found, do="give an array (x, y, z)"
            )
        x, y, z = voxels.shape
        return cls(voxels.transpose(2, 1, 0), Grid.from_affine_ras((x, y, z), matrix))

    def to_numpy(self) -> AnyArray:
        """Return the array in nibabel's order (x, y, z), as a view; `affine` is its position."""
        return self.array.transpose(2, 1, 0)

    @property
    def affine(self) -> FloatArray:
        """4x4 matrix from voxel index (x, y, z) to world position (RAS, mm), as in nibabel."""
        return self.grid.affine_ras

    def like(self, array: AnyArray) -> Volume:
        """Return another array (z, y, x) on the same grid."""
        return Volume(array, self.grid)


def grid_of(image: sitk.Image) -> Grid:
    """Return the grid of a 3-D SimpleITK image."""
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def from_sitk(image: sitk.Image) -> Volume:
    """Copy a 3-D scalar SimpleITK image into a Volume."""
    import SimpleITK as sitk

    return Volume(sitk.GetArrayFromImage(image), grid_of(image))


def to_sitk(volume: Volume) -> sitk.Image:
    """Copy a Volume into a SimpleITK image with geometry only (other header fields make ITK print warnings)."""
    import SimpleITK as sitk

    array = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(volume.grid.spacing_mm)
    image.SetOrigin(volume.grid.origin_mm)
    image.SetDirection(volume.grid.direction)
    return image
