"""Register a brain to the template by an affine transform on DWI, which is used only if it passes checks.

Mattes mutual information, coarse to fine (Mattes et al., IEEE TMI 2003; SimpleITK), from several starts. Every voxel of the shrunken image
counts, and the metric is summed by one thread: the same image gives the same map, whatever the number of threads.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from ensemble.findings.template import Template, shipped_template
from ensemble.memory import is_out_of_memory
from ensemble.metrics import dice
from ensemble.resample import resample_volume
from ensemble.types import BoolArray, FloatArray
from ensemble.volume import Volume, to_sitk

log = logging.getLogger(__name__)

_BINS = 32
#: Voxel sizes of the levels; brain edges count as far as this around it.
_COARSE_MM, _MIDDLE_MM, _FINE_MM, _RIM_MM = 8.0, 6.0, 4.0, 8.0
_PADDING_MM = 40.0
#: Starts: nods (about the axis from left to right, in degrees) of a head as its header says, and turned about an axis (x, y, z): what fits
#: better upside down or sideways has a wrong header, and must be detected. The best of either kind goes on to the next level.
_NODS = (-20.0, 0.0, 20.0)
_TURNS = tuple(
    (axis, turn) for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)) for turn in (-90.0, 90.0, 180.0)
)
#: A usual one, template over brain.
_SCALE = 1.1
#: Values of DWI (normal tissue: 1) beyond this are lesions or artefacts, which the template does not have.
_BRIGHTEST = 1.6


@dataclass(frozen=True)
class TransformLimits:
    """Bounds on the affine transform from brain to template: overlap, coverage, scale, rotation and similarity.

    A transform outside them is rejected. docs/adr/0024 shows how whole and half heads score.
    """

    overlap: float = 0.80
    """Least Dice of the brain and the template's, within the field of view."""
    covered: float = 0.70
    """Minimum share of the template's brain inside the patient's brain."""
    scale: tuple[float, float] = (0.75, 1.55)
    """Along any direction, template over brain."""
    stretch: float = 1.45
    """Most of the largest scale over the smallest."""
    turn_degrees: float = 50.0
    """Most rotation."""
    likeness: float = 0.15
    """Least correlation of the template with the tissue's own contrast."""


LIMITS = TransformLimits()


@dataclass(frozen=True)
class TemplateTransform:
    """The affine transform from an image to the template, and the measures by which its quality is checked."""

    matrix: FloatArray
    """4x4, from points of the image to points of the template (LPS, mm)."""
    overlap: float
    """Dice of the brain and the template's, within the field of view."""
    covered: float
    """Share of the template's brain inside the patient's brain."""
    scale: tuple[float, float, float]
    """Template over brain, largest first."""
    turn_degrees: float
    likeness: float
    """Correlation in the brain of the template with the contrast of tissue and CSF, from ADC."""

    def problems(self, limits: TransformLimits = LIMITS) -> list[str]:
        """Return why the transform can't be trusted; empty if it can."""
        low, high = limits.scale
        checks = (
            (self.covered >= limits.covered, f"the image contains only {self.covered:.0%} of a brain"),
            (self.overlap >= limits.overlap, f"the brain overlaps the template's by a Dice of {self.overlap:.2f} only"),
            (
                low <= self.scale[2] and self.scale[0] <= high and self.scale[0] <= limits.stretch * self.scale[2],
                f"implausible scale ({', '.join(f'{s:.2f}' for s in self.scale)})",
            ),
            (self.turn_degrees <= limits.turn_degrees, f"implausible rotation ({self.turn_degrees:.0f} degrees)"),
            (self.likeness >= limits.likeness, f"the inside does not look like the template's ({self.likeness:.2f})"),
        )
        return [text for holds, text in checks if not holds]

    def transform(self) -> sitk.AffineTransform:
        """Return the SimpleITK transform from image points to template points."""
        return to_sitk_transform(self.matrix)


def to_sitk_transform(matrix: FloatArray) -> sitk.AffineTransform:
    """Return a 4x4 matrix (LPS, mm) as a SimpleITK transform."""
    found = sitk.AffineTransform(3)
    found.SetMatrix(matrix[:3, :3].ravel().tolist())
    found.SetTranslation(matrix[:3, 3].tolist())
    return found


def register_to_template(
    dwi: Volume, adc: Volume, brain: BoolArray, atlas_template: Template | None = None
) -> TemplateTransform | None:
    """Register a brain to the template.

    Args:
        dwi, adc: normalised by tissue (1 is normal brain), on one grid.
        brain: bool (z, y, x) on that grid.
        atlas_template: the template; the shipped one if None.

    Returns None if ITK finds no transform; a transform may have `problems`.
    """
    atlas_template = atlas_template or shipped_template()
    masked = dwi.like(np.clip(np.where(brain, dwi.array, 0), 0, _BRIGHTEST).astype(np.float32))
    matrix = _optimised(to_sitk(masked), to_sitk(dwi.like(brain.astype(np.float32))), atlas_template)
    return None if matrix is None else _judged(matrix, adc, brain, atlas_template)


def _optimised(still: sitk.Image, brain: sitk.Image, atlas_template: Template) -> FloatArray | None:
    """Return the best affine transform (4x4) from image to template points; None if ITK fails."""
    centre, target = _centre(brain), _centre(to_sitk(atlas_template.t1.like(atlas_template.hull.astype(np.float32))))
    fixed, moving = (
        sitk.SmoothingRecursiveGaussian(image, _COARSE_MM / 2)
        for image in (_shrunk(still, _COARSE_MM), _padded(atlas_template, _COARSE_MM))
    )
    region = _region(brain, _COARSE_MM)
    middle = _shrunk(still, _MIDDLE_MM), _padded(atlas_template, _MIDDLE_MM), _region(brain, _MIDDLE_MM)
    found = []
    upright = [(nod, ((1.0, 0.0, 0.0), 0.0)) for nod in _NODS]
    for starts in (upright, [(0.0, turn) for turn in _TURNS]):
        tried = []
        for nod, (axis, degrees) in starts:
            turn = sitk.VersorTransform(axis, math.radians(degrees))
            turn.SetCenter(target.tolist())
            start = sitk.Similarity3DTransform()
            start.SetCenter(centre.tolist())
            start.SetRotation((1.0, 0.0, 0.0), math.radians(nod))
            start.SetTranslation((target - centre).tolist())
            start.SetScale(_SCALE)
            # the template is rotated instead of the start, since a versor of 180 degrees can't be optimised further
            value = _descend(start, fixed, _turned_back(moving, turn), region, step_mm=4.0)
            tried.append((value, start, turn))
        _, start, turn = min(tried, key=lambda one: one[0])
        affine = sitk.AffineTransform(3)
        affine.SetCenter(centre.tolist())
        affine.SetMatrix(
            (np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(start.GetMatrix(), (3, 3))).ravel().tolist()
        )
        there = turn.TransformPoint(start.TransformPoint(centre.tolist()))
        affine.SetTranslation((np.array(there) - centre).tolist())
        found.append((_descend(affine, *middle, step_mm=2.0), affine))
    affine = min(found, key=lambda one: one[0])[1]
    fine = _shrunk(still, _FINE_MM), _padded(atlas_template, _FINE_MM), _region(brain, _FINE_MM)
    if math.isinf(_descend(affine, *fine, step_mm=1.0)):
        return None
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(affine.GetMatrix(), (3, 3)).round(6)
    matrix[:3, 3] = (np.array(affine.TransformPoint((0.0, 0.0, 0.0)))).round(3)
    return matrix


def _descend(
    transform: sitk.Transform,
    fixed: sitk.Image,
    moving: sitk.Image,
    region: sitk.Image,
    step_mm: float,
) -> float:
    """Optimise a transform in place. Returns the metric (lower is better); infinite if ITK fails, e.g. with too little overlap."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfWorkUnits(1)  # sums in one order
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(region)
    method.SetInterpolator(sitk.sitkLinear)
    method.MetricUseMovingImageGradientFilterOff()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step_mm,
        minStep=0.01,
        numberOfIterations=100,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.debug("registration to the template: %s", error)
        return math.inf
    return float(method.GetMetricValue())


def _turned_back(image: sitk.Image, turn: sitk.VersorTransform) -> sitk.Image:
    """Return the image with its header changed so that each point shows what `turn` maps it to."""
    back = turn.GetInverse()
    turned = sitk.Image(image)
    turned.SetOrigin(back.TransformPoint(image.GetOrigin()))
    matrix = np.reshape(turn.GetMatrix(), (3, 3)).T @ np.reshape(image.GetDirection(), (3, 3))
    turned.SetDirection(matrix.ravel().tolist())
    return turned


def _centre(mask: sitk.Image) -> FloatArray:
    """Return the centre of a mask, in mm."""
    index = np.argwhere(sitk.GetArrayViewFromImage(mask) > 0).mean(axis=0)[::-1]
    return np.array(mask.TransformContinuousIndexToPhysicalPoint(index.tolist()))


def _shrunk(image: sitk.Image, mm: float) -> sitk.Image:
    return sitk.BinShrink(
        image, [min(size, max(1, round(mm / at))) for at, size in zip(image.GetSpacing(), image.GetSize(), strict=True)]
    )


def _region(brain: sitk.Image, mm: float) -> sitk.Image:
    """Return the brain and a rim around it."""
    small = _shrunk(brain, mm)
    return sitk.BinaryDilate(small > 0.3, [max(1, round(_RIM_MM / at)) for at in small.GetSpacing()])


def _padded(atlas_template: Template, mm: float) -> sitk.Image:
    """Return the template at coarse voxels, padded with air, because points outside an image would not count."""
    steps = [round(_PADDING_MM / at) for at in atlas_template.t1.grid.spacing_mm]
    return _shrunk(sitk.ConstantPad(to_sitk(atlas_template.t1), steps, steps, 0.0), mm)


def _judged(matrix: FloatArray, adc: Volume, brain: BoolArray, atlas_template: Template) -> TemplateTransform:
    """Return the transform with the numbers by which it is checked."""
    linear = matrix[:3, :3]
    left, scale, right = np.linalg.svd(linear)
    cosine = (float(np.trace(left @ right)) - 1) / 2
    there = resample_volume(atlas_template.t1, adc.grid, transform=to_sitk_transform(matrix)).array
    hull = there > 0
    both = brain & hull
    total_ml = atlas_template.hull.sum() * atlas_template.t1.grid.voxel_ml
    covered = both.sum() * adc.grid.voxel_ml * abs(float(np.linalg.det(linear))) / total_ml
    return TemplateTransform(
        matrix,
        overlap=dice(brain, hull),
        covered=float(min(covered, 1.0)),
        scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        turn_degrees=math.degrees(math.acos(min(1.0, max(-1.0, cosine)))),
        likeness=_likeness(there[both], adc.array[both]),
    )


def _likeness(t1: FloatArray, adc: FloatArray) -> float:
    """Return the correlation of a T1 image with tissue (1) against CSF (0) from ADC; both are dark in CSF."""
    if t1.size < 2:
        return 0.0
    tissue = np.clip(2.0 - adc, 0, 1)
    spread = float(t1.std() * tissue.std())
    return float(((t1 - t1.mean()) * (tissue - tissue.mean())).mean()) / spread if spread else 0.0
