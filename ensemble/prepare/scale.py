"""Check that images have the size of a head: a header in cm, m or microns, or with wrong slice spacing, is refused before any network runs.

A brain's volume follows the voxel size to the third power, and no one else would notice: networks resample whatever they get.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.metrics import volume_ml
from ensemble.prepare.brain import above_background
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume

Range = tuple[float, float]

#: Volume that a brain may have, in ml: adults, children, large losses; --brain-ml accepts infants and patients after craniectomy.
BRAIN_ML: Range = (300.0, 2500.0)
#: Usual volume of a whole adult brain, in ml; other volumes give a note.
USUAL_BRAIN_ML: Range = (600.0, 2200.0)
#: Longest field of view of a head (mm), and the largest volume of a head with neck in units of the largest brain.
_LONGEST_VIEW_MM, _HEADS_IN_BRAINS = 1000.0, 4.0
#: Extent (mm) along any axis of 99 % of the smallest and the largest brain of `BRAIN_ML` (adults: 120 to 190 mm; a slab: less).
_BRAIN_MM, _EXTENT_SHARE = (30.0, 250.0), 0.99
#: Longest axis of a whole brain in units of its shortest; and the end section, relative to the largest, above which a brain is cut off.
#: `benchmarks.margins` prints the values of whole brains; slabs end with 0.25 to 1 of their largest section.
_MAX_UNEQUAL, _CUT_SHARE = 2.1, 0.25
#: Largest relative difference of the voxel sizes of two images with the same matrix.
_SAME_SCALE = 0.01
#: Wrong units of headers, by the resulting factor on lengths.
_MISTAKES = {0.1: "cm", 10.0: "tenths of mm", 1e-3: "m (or of microns as mm)", 1e3: "microns (or of mm as m)"}
_DO = (
    "check the units and the slice spacing of the header (mm; with the gap between slices; NIfTI: pixdim, sform, xyzt_units), or export it "
    "again. For an infant, after craniectomy, or for a head that keeps its skull, set the accepted volume with --brain-ml LOW,HIGH"
)


def check_scale(case: DraftCase) -> StepResult:
    """Raise InputRefused for images that by their headers are not as large as a head, and for ADC with another voxel size than DWI."""
    for modality, image in case.images.items():
        _refuse_other_scale(image, case.paths[modality], modality, case.brain_ml)
    _refuse_two_scales(case.adc.grid, case.dwi.grid, case.paths[Modality.ADC])
    return case, ()


def check_brain_volume(case: DraftCase) -> StepResult:
    """Raise InputRefused for a brain of impossible volume; note an unusual one."""
    notes = refuse_implausible_brain(case.brain, case.dwi.grid, "brain", case.paths[Modality.DWI], case.brain_ml)
    return case, notes


def _refuse_other_scale(image: Volume, where: Path, modality: Modality, brain_ml: Range) -> None:
    """Raise InputRefused if an image, by its header, is too small to hold a brain, or larger than any head.

    Looks at the field of view, and at what is not background; so it goes before any resampling and any network.
    """
    grid, array, what = image.grid, image.array, f"the {modality.label} image's header gives it an impossible size"
    view = [n * mm for n, mm in zip(grid.size, grid.spacing_mm, strict=True)]
    view_ml = float(np.prod(view)) / 1000
    low, high = brain_ml
    if not (view_ml >= low and max(view) <= _LONGEST_VIEW_MM):
        size = " x ".join(f"{mm:.4g}" for mm in view)
        found = f"its field of view measures {size} mm ({view_ml:.3g} ml), a brain measures {low:g} to {high:g} ml"
        raise _refusal(what, where, found)
    foreground = above_background(array)
    head_ml = volume_ml(foreground, grid.spacing_zyx_mm)
    if head_ml < low:
        found = f"the foreground measures {head_ml:.3g} ml, with voxels of {_spacing(grid)} mm; a brain measures {low:g} to {high:g} ml"
        raise _refusal(what, where, found, head_ml, brain_ml)
    if modality is Modality.ADC:
        return  # its air may be as bright as its tissue
    # most of the foreground may be noise of the air, which is far below the bright tissue
    tissue_ml = volume_ml(array > 0.25 * np.percentile(array[foreground], 98), grid.spacing_zyx_mm)
    if tissue_ml > _HEADS_IN_BRAINS * high:
        found = f"the bright region measures {tissue_ml:.0f} ml, with voxels of {_spacing(grid)} mm; "
        found += f"a brain measures {low:g} to {high:g} ml"
        raise _refusal(what, where, found, tissue_ml, brain_ml)


def _refuse_two_scales(one: Grid, other: Grid, where: Path) -> None:
    """Raise InputRefused for an ADC map with the DWI's matrix and another voxel size: one header must be wrong."""
    ratios = [abs(a / b - 1) for a, b in zip(one.spacing_mm, other.spacing_mm, strict=True)]
    if one.size == other.size and max(ratios) > _SAME_SCALE:
        found = f"both have {' x '.join(map(str, one.size))} voxels, of {_spacing(one)} mm (ADC) and {_spacing(other)} mm (DWI)"
        raise _refusal("DWI and ADC have different voxel sizes, so one of their headers is wrong", where, found)


def refuse_implausible_brain(brain: BoolArray, grid: Grid, what: str, where: Path, brain_ml: Range) -> tuple[Note, ...]:
    """Raise InputRefused for an extracted brain (z, y, x) of impossible size; return a note on an unusual one."""
    low, high = brain_ml
    volume = volume_ml(brain, grid.spacing_zyx_mm)
    if not low <= volume <= high:
        found = f"{volume:.3g} ml, with voxels of {_spacing(grid)} mm; a brain has {low:g} to {high:g} ml"
        raise _refusal(f"the {what} has an impossible size for a brain", where, found, volume, brain_ml)
    lengths = brain_extent_mm(brain, grid)
    shortest, longest = (
        mm * (now / usual) ** (1 / 3) for mm, now, usual in zip(_BRAIN_MM, brain_ml, BRAIN_ML, strict=True)
    )
    if not (min(lengths) >= shortest and max(lengths) <= longest):
        size = " x ".join(f"{mm:.0f}" for mm in reversed(lengths))
        found = f"it measures {size} mm along x, y, z, with voxels of {_spacing(grid)} mm; "
        found += f"a brain measures {shortest:.0f} to {longest:.0f} mm"
        raise _refusal(f"the {what} has an impossible size for a brain", where, found)
    if max(lengths) > _MAX_UNEQUAL * min(lengths) and cut_off_share(brain) <= _CUT_SHARE:
        size = " x ".join(f"{mm:.0f}" for mm in reversed(lengths))
        found = f"it measures {size} mm along x, y, z without being cut off, with voxels of {_spacing(grid)} mm"
        raise _refusal(f"the {what} has an impossible shape for a brain", where, found)
    if USUAL_BRAIN_ML[0] <= volume <= USUAL_BRAIN_ML[1]:
        return ()
    hint = "is the skull still there?" if volume > USUAL_BRAIN_ML[1] else "is part of the brain missing?"
    usual = f"a brain usually {USUAL_BRAIN_ML[0]:.0f} to {USUAL_BRAIN_ML[1]:.0f} ml"
    return (Note(f"the foreground measures {volume:.0f} ml, {usual}: {hint}"),)


def brain_extent_mm(brain: BoolArray, grid: Grid) -> list[float]:
    """Return the extent (mm; z, y, x) of a brain mask (z, y, x), ignoring its outermost voxels: `_EXTENT_SHARE` of them lie within it."""
    return [_length(brain, axis) * mm for axis, mm in enumerate(grid.spacing_zyx_mm)]


def cut_off_share(brain: BoolArray) -> float:
    """Return the area of the largest end slice of a brain mask (z, y, x) along any axis, divided by that axis's largest slice area.

    It is high for a brain that the field of view cuts off.
    """
    sections = [brain.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return max(float(areas[np.flatnonzero(areas)[[0, -1]]].max() / areas.max()) for areas in sections)


def _length(brain: BoolArray, axis: int) -> int:
    """Return the number of slices along an axis that hold most of the brain, without parts that stick out, such as a spinal cord."""
    profile = np.cumsum(brain.sum(axis=tuple({0, 1, 2} - {axis})))
    rest = (1 - _EXTENT_SHARE) / 2 * profile[-1]
    return int(np.searchsorted(profile, profile[-1] - rest) - np.searchsorted(profile, rest, "right")) + 1


def _refusal(
    what: str, where: Path, found: str, volume: float | None = None, brain_ml: Range = BRAIN_ML
) -> InputRefused:
    """Return the error, naming the unit that would explain a volume (ml)."""
    fitting = [
        unit for factor, unit in _MISTAKES.items() if volume and brain_ml[0] <= volume / factor**3 <= brain_ml[1]
    ]
    guess = f": the header may be in {fitting[0]} instead of mm" if fitting else ""
    return InputRefused(what, where=where, found=found + guess, do=_DO)


def _spacing(grid: Grid) -> str:
    return " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm)
