"""The grid of an image in ITK's LPS world, and lossless changes of axis order.

Grids speak ITK's order (x, y, z); arrays speak numpy's (z, y, x). `volume.py` is the one place that flips between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from math import prod

import numpy as np

from ensemble.errors import InputRefused
from ensemble.types import AnyArray, FloatArray

Triple = tuple[float, float, float]

#: Headers of one acquisition that differ by less than this are the same but for rounding, in voxels.
ROUNDING_VOXELS = 0.05
#: Largest deviation of a direction matrix's columns from unit length and right angles (as cosines): headers may give three digits.
MAX_SKEW = 2e-3
#: More voxels than any brain image has, in all and along an axis; a damaged header or plan may ask for as many as it likes.
MAX_VOXELS, MAX_ALONG_AXIS = 150_000_000, 8192


def is_too_large(shape: Sequence[int], max_voxels: int = MAX_VOXELS) -> bool:
    """Return whether a grid has more voxels than any brain image; checked before memory is allocated."""
    return prod(shape) > max_voxels or max(shape) > MAX_ALONG_AXIS


def describe_size_limit(max_voxels: int = MAX_VOXELS) -> str:
    """Return in words what `is_too_large` permits."""
    return f"at most {max_voxels / 1e6:g} million voxels are allowed, and {MAX_ALONG_AXIS} along an axis"


@dataclass(frozen=True)
class Grid:
    """Size, spacing, origin and direction of a 3-D image, as in its header."""

    size: tuple[int, int, int]
    """Voxels along x, y, z."""
    spacing_mm: Triple
    """Distance of neighbouring voxel centres along x, y, z, in mm."""
    origin_mm: Triple
    """World position (LPS, mm) of the centre of voxel (0, 0, 0)."""
    direction: tuple[float, ...]
    """3x3 direction cosines, row by row; column k is the world direction of index axis k."""
    sform: tuple[float, ...] | None = field(default=None, compare=False, repr=False)
    """The sform of a NIfTI header: `affine` in RAS, 3x4 row by row, bit for bit, for computations that depend on the last bit."""

    @classmethod
    def from_affine_ras(cls, size: tuple[int, int, int], affine: FloatArray) -> Grid:
        """Make the grid of `size` voxels (x, y, z) from a 4x4 affine (RAS, mm), as in nibabel.

        Raises InputRefused when the matrix is of another shape, not finite, flat, or sheared.
        """
        rows = "; ".join(" ".join(f"{number:.4g}" for number in row) for row in np.atleast_2d(affine)[:4])
        refused = InputRefused(
            "the affine can't be used",
            found=f"voxel to world (RAS, mm): {rows}",
            do="give the 4x4 affine of the image's header (last row 0 0 0 1); if its axes are not orthogonal, resample the image first",
        )
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or list(affine[3]) != [0, 0, 0, 1]:
            raise refused
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not (spacing > 0).all():
            raise refused
        axes = affine[:3, :3] / spacing
        if np.abs(axes.T @ axes - np.eye(3)).max() > MAX_SKEW:
            raise refused
        to_lps = np.diag([-1.0, -1.0, 1.0])
        mm, origin = spacing.tolist(), (to_lps @ affine[:3, 3] + 0.0).tolist()
        direction = tuple((to_lps @ axes + 0.0).ravel().tolist())
        return cls(
            size,
            (mm[0], mm[1], mm[2]),
            (origin[0], origin[1], origin[2]),
            direction,
            tuple(affine[:3].ravel().tolist()),
        )

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Shape of the numpy array on this grid."""
        x, y, z = self.size
        return z, y, x

    @property
    def spacing_zyx_mm(self) -> Triple:
        x, y, z = self.spacing_mm
        return z, y, x

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @cached_property
    def affine(self) -> FloatArray:
        """4x4 matrix from voxel index (x, y, z) to world position (LPS, mm)."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(self.direction, (3, 3)) * np.asarray(self.spacing_mm)
        matrix[:3, 3] = self.origin_mm
        return matrix

    @property
    def affine_ras(self) -> FloatArray:
        """4x4 matrix from voxel index (x, y, z) to world position (RAS, mm), as nibabel reads it."""
        if self.sform is None:
            return np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        return np.vstack([np.reshape(self.sform, (3, 4)), [0.0, 0.0, 0.0, 1.0]])

    def points_mm(self, index_zyx: AnyArray) -> FloatArray:
        """Return the world positions (..., 3; LPS, mm) of voxels with the indices (..., 3; z, y, x) that `np.argwhere` returns."""
        return np.asarray(index_zyx[..., ::-1] @ self.affine[:3, :3].T + self.affine[:3, 3])

    @cached_property
    def corners_mm(self) -> FloatArray:
        """World positions (8, 3) of the centres of the eight corner voxels, LPS, mm."""
        ends = np.array(np.meshgrid(*[(0, n - 1) for n in self.size], indexing="ij")).reshape(3, 8)
        return (self.affine[:3, :3] @ ends).T + self.affine[:3, 3]

    def distance_voxels(self, other: Grid) -> float:
        """Return the largest distance between equal corner voxels of two grids, in voxels of this one; infinite if sizes differ."""
        if self.size != other.size:
            return float("inf")
        apart = (other.corners_mm - self.corners_mm) @ np.linalg.inv(self.affine[:3, :3]).T
        return float(np.abs(apart).max())

    def same_lattice(self, other: Grid, tolerance_voxels: float) -> bool:
        """Return whether this grid's voxel centres coincide with the other's in any order, within a tolerance in its voxels.

        This holds for flipped, permuted or cropped copies of an image, which are reordered instead of interpolated.
        """
        to_other = np.linalg.inv(other.affine) @ self.affine
        nearest = np.round(to_other)
        turned = nearest[:3, :3]
        if not (np.abs(turned).sum(axis=0) == 1).all() or not (np.abs(turned).sum(axis=1) == 1).all():
            return False
        ends = np.array(np.meshgrid(*[(0, n - 1) for n in self.size], [1], indexing="ij")).reshape(4, 8)
        return bool(np.abs((to_other - nearest) @ ends).max() <= tolerance_voxels)

    def describe(self) -> str:
        """Return a description of the grid for messages."""
        size = " x ".join(map(str, self.size))
        spacing = " x ".join(f"{mm:.3g}" for mm in self.spacing_mm)
        origin = ", ".join(f"{mm:.1f}" for mm in self.origin_mm)
        return f"{size} voxels of {spacing} mm at ({origin}), axes {''.join(self.axis_letters)}"

    @cached_property
    def axis_letters(self) -> tuple[str, str, str]:
        """The nearest world direction of each index axis x, y, z: one of L R P A S I."""
        order, signs = _nearest_axes(np.reshape(self.direction, (3, 3)))
        return tuple("LPS"[world] if sign > 0 else "RAI"[world] for world, sign in zip(order, signs, strict=True))  # type: ignore[return-value]

    def canonical(self) -> Reorientation:
        """Return the flips and axis permutation that bring arrays on this grid closest to LPS."""
        order, signs = _nearest_axes(np.reshape(self.direction, (3, 3)))
        # numpy axis a holds index axis 2 - a; numpy axis 0 is to become the one that runs along S, and so on
        to_numpy = [2 - order.index(world) for world in (2, 1, 0)]
        flips = tuple(2 - axis for axis, sign in enumerate(signs) if sign < 0)
        return Reorientation(transpose=(to_numpy[0], to_numpy[1], to_numpy[2]), flips=flips)


@dataclass(frozen=True)
class Reorientation:
    """A lossless change of axis order and direction of (..., z, y, x) arrays that can be undone."""

    transpose: tuple[int, int, int]
    """The old (z, y, x) axis that becomes the new first, second, third one."""
    flips: tuple[int, ...]
    """Old (z, y, x) axes that are reversed."""

    def apply(self, array: AnyArray) -> AnyArray:
        """Return a view of an array (..., z, y, x) in the new orientation."""
        return self._moved(np.flip(array, self._flip_axes), self.transpose)

    def undo(self, array: AnyArray) -> AnyArray:
        """Return a view of a reoriented array in the original orientation."""
        back = np.argsort(self.transpose)
        return np.flip(self._moved(array, (int(back[0]), int(back[1]), int(back[2]))), self._flip_axes)

    def spacing(self, spacing_zyx_mm: Triple) -> Triple:
        """Return the spacing (z, y, x) of the array that `apply` returns."""
        first, second, third = self.transpose
        return spacing_zyx_mm[first], spacing_zyx_mm[second], spacing_zyx_mm[third]

    @property
    def _flip_axes(self) -> tuple[int, ...]:
        return tuple(axis - 3 for axis in self.flips)

    @staticmethod
    def _moved(array: AnyArray, order: tuple[int, int, int]) -> AnyArray:
        lead = array.ndim - 3
        return array.transpose([*range(lead), *[lead + axis for axis in order]])


def _nearest_axes(direction: FloatArray) -> tuple[list[int], list[float]]:
    """Return for each index axis the nearest world axis (0 L, 1 P, 2 S; each once), and its sign."""
    weights = np.abs(direction)
    order = max(permutations(range(3)), key=lambda world: sum(weights[world[k], k] for k in range(3)))
    return list(order), [float(np.sign(direction[order[k], k])) or 1.0 for k in range(3)]
