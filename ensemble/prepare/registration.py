"""Rigid registration of FLAIR to DWI, used only if it aligns the images better than their headers do.

Mattes mutual information, coarse to fine (Mattes et al., IEEE TMI 2003; SimpleITK). Random samples come from a fixed seed and the
metric is summed in one order, so that the same images give the same transform whatever the number of threads.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from ensemble.memory import is_out_of_memory
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, BoolArray
from ensemble.volume import Volume, to_sitk

log = logging.getLogger(__name__)

#: Largest movement of a patient on the table between two series (shift of the brain's centre, rotation).
MAX_SHIFT_MM, MAX_TURN_DEGREES = 40.0, 25.0
#: Gain of normalised mutual information (above its minimum of 1) that is no accident of interpolation, as a share.
MIN_GAIN = 0.02
#: Normalised mutual information below which two images show nothing in common (aligned FLAIR and DWI: 1.12 to 1.18).
MIN_INFORMATION = 1.04
_BINS, _SAMPLES, _SEED = 32, 40_000, 20220411
#: Margin around the brain (mm), so that its edge counts in the registration.
_MARGIN_MM = 6.0
#: The moving image is averaged in blocks to about this voxel size; more detail than the DWI has is of no use.
_DETAIL_MM = 1.2


@dataclass(frozen=True)
class RegistrationResult:
    """The transform that a registration found, if it is used, and a summary."""

    transform: sitk.Transform | None
    """From points on the DWI to points on the FLAIR (LPS, mm); None if the headers are kept."""
    summary: str
    """One clause on it, for the report."""


def register_rigidly(moving: Volume, by_header: Volume, fixed: Volume, brain: BoolArray) -> RegistrationResult:
    """Align `moving` to `fixed`.

    Args:
        moving: the image on its own grid.
        by_header: the same image on the fixed grid, by its header.
        fixed: the image that stays, (z, y, x).
        brain: where to look, bool on the fixed grid.

    Never raises for images that can't be registered: their headers are kept, and the summary says why.
    """
    region = _with_margin(brain, fixed.grid.spacing_zyx_mm)
    centre = fixed.grid.affine[:3] @ np.append(np.argwhere(brain).mean(axis=0)[::-1], 1)
    fixed = fixed.like(_without_peaks(fixed.array))
    transform = _optimised(moving, fixed, region, centre)
    if transform is None:
        return RegistrationResult(None, "found no alignment")
    shift, turn = _motion(transform)
    motion = f"moved by {shift:.1f} mm and {turn:.1f} degrees"
    if shift > MAX_SHIFT_MM or turn > MAX_TURN_DEGREES:
        return RegistrationResult(None, f"implausible ({motion}), not used")
    moved = resample_volume(moving, fixed.grid, transform=transform).array
    before, after = (_information(fixed.array, _without_peaks(image), region) for image in (by_header.array, moved))
    gain = f"normalised mutual information {before:.4f} by header, {after:.4f} registered"
    if max(before, after) < MIN_INFORMATION:
        return RegistrationResult(None, f"FLAIR and DWI share little information; is it the same head? ({gain})")
    if not after - 1 > (1 + MIN_GAIN) * (before - 1):
        return RegistrationResult(None, f"no better ({gain}), not used")
    return RegistrationResult(transform, f"{motion} ({gain})")


def _optimised(moving: Volume, fixed: Volume, region: BoolArray, centre: AnyArray) -> sitk.Euler3DTransform | None:
    """Return the best transform found; None if ITK fails, as it does when too few samples overlap.

    Gradients are those of the metric itself: ITK's filter would smooth them, which takes longer and aligns less well
    (`benchmarks/registration.py`).
    """
    still = to_sitk(fixed)
    moved = to_sitk(moving.like(moving.array.astype(np.float32, copy=False)))
    smaller = sitk.BinShrink(moved, [max(1, round(_DETAIL_MM / mm)) for mm in moving.grid.spacing_mm])
    smaller = sitk.Clamp(smaller, lowerBound=0.0, upperBound=_peak(sitk.GetArrayViewFromImage(smaller)))
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfWorkUnits(1)  # sums in one order; SetNumberOfThreads leaves several
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(to_sitk(fixed.like(region)))
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = min(1.0, _SAMPLES / region.size)
    method.SetMetricSamplingPercentagePerLevel([min(1.0, 8 * share), share], seed=_SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.MetricUseMovingImageGradientFilterOff()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([3.0, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.01, numberOfIterations=60, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    transform = sitk.Euler3DTransform()
    transform.SetCenter(centre.tolist())
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(still, smaller)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.debug("registration: %s", error)
        return None
    return _rounded(transform)


def _rounded(transform: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """Return a transform rounded to a thousandth of a millimetre, and to as much at the brain's surface."""
    angles, shift = transform.GetParameters()[:3], transform.GetParameters()[3:]
    transform.SetParameters([round(angle, 5) for angle in angles] + [round(mm, 3) for mm in shift])
    return transform


def _motion(transform: sitk.Euler3DTransform) -> tuple[float, float]:
    """Return the shift of the brain's centre in mm, and the rotation in degrees."""
    matrix = np.reshape(transform.GetMatrix(), (3, 3))
    cosine = min(1.0, max(-1.0, (float(np.trace(matrix)) - 1) / 2))
    return float(np.linalg.norm(transform.GetTranslation())), math.degrees(math.acos(cosine))


def _information(fixed: AnyArray, moved: AnyArray, region: BoolArray) -> float:
    """Return the normalised mutual information (Studholme 1999) within a region, peaks clipped.

    1 where images say nothing of each other, up to 2.
    """
    counts, _, _ = np.histogram2d(fixed[region], moved[region], bins=_BINS)
    joint = counts / counts.sum()
    both = _entropy(joint)
    return 1.0 if both == 0 else (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))) / both


def _entropy(p: AnyArray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _without_peaks(image: AnyArray) -> AnyArray:
    """Return values clipped to between 0 and the peak; otherwise a few hot voxels would stretch the histogram bins."""
    return np.clip(image, 0, _peak(image)).astype(np.float32, copy=False)


def _peak(image: AnyArray) -> float:
    """Return the 99.5th percentile of the positive values."""
    positive = image[image > 0]
    return float(np.percentile(positive, 99.5)) if positive.size else 1.0


def _with_margin(brain: BoolArray, spacing_zyx_mm: tuple[float, float, float]) -> BoolArray:
    structure = ndimage.generate_binary_structure(3, 1)
    steps = max(1, round(_MARGIN_MM / min(spacing_zyx_mm)))
    grown = ndimage.binary_dilation(brain, structure, iterations=min(steps, 4))
    return np.asarray(grown, dtype=bool)
