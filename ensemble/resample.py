"""Resample volumes to other grids (SimpleITK), and arrays as nnU-Net plans specify.

nnU-Net resizes arrays with scikit-image splines, slice by slice where voxels are strongly anisotropic. Interpolation along one
axis is linear in the samples, so here each axis is one small matrix, found by resizing the unit vectors; the result is the same
up to rounding and takes a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import Grid, describe_size_limit, is_too_large
from ensemble.types import AnyArray, BoolArray, FloatArray
from ensemble.volume import Volume, from_sitk, to_sitk

if TYPE_CHECKING:
    import SimpleITK as sitk

#: Spacing ratio above which nnU-Net treats the coarsest axis separately (its ANISO_THRESHOLD).
ANISOTROPY_THRESHOLD = 3.0


def resample_volume(volume: Volume, grid: Grid, linear: bool = True, transform: sitk.Transform | None = None) -> Volume:
    """Resample a volume to another grid in physical space; 0 where the volume has no data.

    Linear interpolation gives float32; otherwise the nearest voxel's value in the volume's own type (bool becomes uint8). A
    transform (ITK's sense: from points of `grid` to points of the volume) moves the volume first.

    Raises InputRefused for a grid with more voxels than any brain image has.
    """
    import SimpleITK as sitk

    if linear:
        volume = volume.like(volume.array.astype(np.float32, copy=False))
    return _interpolated(volume, grid, sitk.sitkLinear if linear else sitk.sitkNearestNeighbor, transform)


def resample_cubic(volume: Volume, grid: Grid, transform: sitk.Transform | None = None) -> Volume:
    """Resample by cubic B-splines, float32. They overshoot at edges, so few voxels around a stripped brain stay exactly 0."""
    import SimpleITK as sitk

    return _interpolated(volume.like(volume.array.astype(np.float32, copy=False)), grid, sitk.sitkBSpline, transform)


def _interpolated(volume: Volume, grid: Grid, interpolator: int, transform: sitk.Transform | None) -> Volume:
    import SimpleITK as sitk

    _refuse_too_large(grid.size, grid.spacing_mm)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.size)
    resampler.SetOutputSpacing(grid.spacing_mm)
    resampler.SetOutputOrigin(grid.origin_mm)
    resampler.SetOutputDirection(grid.direction)
    resampler.SetInterpolator(interpolator)
    if transform is not None:
        resampler.SetTransform(transform)
    return Volume(from_sitk(resampler.Execute(to_sitk(volume))).array, grid)


def resample_within(volume: Volume, inside: BoolArray, grid: Grid) -> Volume:
    """Resample a volume using only voxels `inside` (linear, float32); 0 where less than half of the neighbourhood is inside.

    Plain interpolation mixes a masked image's rim with the zeros around it: on an ADC map that looks like damage.
    """
    weight = resample_volume(volume.like(inside.astype(np.float32)), grid).array
    total = resample_volume(volume.like(np.where(inside, volume.array, 0)), grid).array
    return Volume(np.divide(total, weight, out=np.zeros_like(total), where=weight > 0.5), grid)


@dataclass(frozen=True)
class NnunetResampling:
    """How nnU-Net plans resample arrays: `resampling_fn_*` and its `_kwargs`."""

    order: int = 3
    """Spline order (0 nearest, 1 linear, 3 cubic)."""
    order_z: int = 0
    """Spline order along the coarse axis when that is treated separately."""
    force_separate_z: bool | None = None
    """Treat the coarsest axis of the *current* spacing separately: always, never, or (None) where spacing is anisotropic."""
    anisotropy_threshold: float = ANISOTROPY_THRESHOLD
    """Ratio of largest to smallest spacing above which an axis is coarse."""
    enabled: bool = True
    """False for plans that turn resampling off."""

    @classmethod
    def from_plans(cls, function: str, kwargs: Mapping[str, Any]) -> NnunetResampling:
        """Read the resampling options of a configuration in plans.json.

        Raises ValueError for a function or option that nnU-Net (2.0 to 2.8) does not have.
        """
        try:
            defaults, renamed = _FUNCTIONS[function]
        except KeyError:
            raise ValueError(f"unknown resampling function {function!r} (known: {', '.join(_FUNCTIONS)})") from None
        fields = dict(defaults)
        for option, value in kwargs.items():
            if option in _WITHOUT_EFFECT:
                continue
            if option not in renamed:
                raise ValueError(f"unknown option {option!r} of {function}")
            field, values = renamed[option]
            fields[field] = value if values is None else _choice(values, option, value)
        return cls(**fields)

    def resize(
        self,
        array: FloatArray,
        shape: Sequence[int],
        spacing: Sequence[float],
        new_spacing: Sequence[float],
    ) -> FloatArray:
        """Resize an array (channels, a, b, c) to (channels, *shape); returns the same array if the shape is unchanged.

        Spacings are those of the array before and after, in mm, in its own axis order; they only decide whether an axis is
        treated separately. Raises InputRefused for a shape of more voxels than any brain image has.
        """
        _refuse_too_large(shape, new_spacing)
        if not self.enabled or tuple(array.shape[1:]) == tuple(shape):
            return array
        coarse = self._coarse_axis(spacing, new_spacing)
        if coarse is None:
            return _resized(array, dict(enumerate(shape)), self.order)
        in_plane = {axis: n for axis, n in enumerate(shape) if axis != coarse}
        array = _resized(array, in_plane, self.order, slices_along=coarse)
        return _along(array, coarse, shape[coarse], self.order_z)

    def _coarse_axis(self, spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
        """Return the axis to resample separately: the one with the single largest spacing; None if there is none."""
        if self.force_separate_z is False:
            return None
        if self.force_separate_z or max(spacing) / min(spacing) > self.anisotropy_threshold:
            deciding = list(spacing)
        elif max(new_spacing) / min(new_spacing) > self.anisotropy_threshold:
            deciding = list(new_spacing)
        else:
            return None
        return deciding.index(max(deciding)) if deciding.count(max(deciding)) == 1 else None


def _refuse_too_large(shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    if is_too_large(shape):
        size, spacing = " x ".join(map(str, shape)), " x ".join(f"{mm:.3g}" for mm in spacing_mm)
        raise InputRefused(
            "a resampled image would be too large",
            found=f"{size} voxels of {spacing} mm; {describe_size_limit()}",
            do="check the units of the image's header (mm), and the voxel size of the members (members list)",
        )


_SPLINES = {
    "order": ("order", None),
    "order_z": ("order_z", None),
    "force_separate_z": ("force_separate_z", None),
    "separate_z_anisotropy_threshold": ("anisotropy_threshold", None),
}
_INTERPOLATE = {
    "mode": ("order", {"linear": 1, "nearest-exact": 0}),
    "aniso_axis_mode": ("order_z", {"nearest-exact": 0}),
    "force_separate_z": ("force_separate_z", None),
    "separate_z_anisotropy_threshold": ("anisotropy_threshold", None),
}
#: nnU-Net's function name -> its own defaults, and its options as our fields (with the values they may take, if few).
_FUNCTIONS: dict[str, tuple[dict[str, Any], Mapping[str, tuple[str, dict[str, int] | None]]]] = {
    "resample_data_or_seg_to_shape": ({"force_separate_z": False}, _SPLINES),
    "resample_torch_fornnunet": ({"order": 1}, _INTERPOLATE),
    "resample_torch_simple": ({"order": 1, "force_separate_z": False}, {"mode": _INTERPOLATE["mode"]}),
    "no_resampling_hack": ({"enabled": False}, {}),
}
#: Options that change labels, speed or memory, not how images and logits are interpolated.
_WITHOUT_EFFECT = {"is_seg", "num_threads", "device", "memefficient_seg_resampling"}


def _choice(values: Mapping[str, int], option: str, value: Any) -> int:
    if value not in values:
        raise ValueError(f"{option} is {value!r}, not one of {', '.join(values)}")
    return values[value]


def _resized(array: FloatArray, lengths: Mapping[int, int], order: int, slices_along: int | None = None) -> FloatArray:
    """Resize the named spatial axes; splines above linear are clipped to the input's range.

    scikit-image clips each image that it is given: the whole channel, or one slice along `slices_along`.
    """
    together = tuple(axis + 1 for axis in range(3) if axis != slices_along)
    low, high = (array.min(together, keepdims=True), array.max(together, keepdims=True)) if order > 1 else (None, None)
    # the axis that shrinks most comes first, so that the following ones have less data
    for axis in sorted(lengths, key=lambda axis: lengths[axis] / array.shape[axis + 1]):
        array = _along(array, axis, lengths[axis], order)
    return np.clip(array, low, high) if order > 1 else array


def _along(array: FloatArray, axis: int, length: int, order: int) -> FloatArray:
    """Resize one spatial axis of (channels, a, b, c) to `length`."""
    samples = array.shape[axis + 1]
    if samples == length:
        return array
    if order == 0:
        return np.take(array, _nearest(samples, length), axis + 1)
    matrix = _interpolation_matrix(samples, length, order).astype(array.dtype)
    if axis == 2:
        return array @ matrix.T
    columns = array.reshape(*array.shape[: axis + 1], samples, -1)
    return (matrix @ columns).reshape(*array.shape[: axis + 1], length, *array.shape[axis + 2 :])


def _nearest(samples: int, length: int) -> AnyArray:
    """Return the index of the sample nearest to each of `length` new voxel centres."""
    centres = (np.arange(length) + 0.5) * (samples / length) - 0.5
    return np.clip(np.floor(centres + 0.5).astype(int), 0, samples - 1)


@lru_cache(maxsize=32)
def _interpolation_matrix(samples: int, length: int, order: int) -> FloatArray:
    """Return the matrix (length, samples) that resizes a line; voxel edges are aligned, edge samples repeated."""
    from scipy import ndimage

    matrix: FloatArray = ndimage.zoom(
        np.eye(samples), (length / samples, 1), order=order, mode="nearest", grid_mode=True
    )
    return matrix
