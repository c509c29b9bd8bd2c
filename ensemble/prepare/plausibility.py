"""Check that DWI and ADC are what they claim: swapped, unweighted, exponential, clipped or half-empty images are refused.

All of it rests on CSF: free water has an ADC four times that of tissue, and therefore is dark on DWI. Everything else that is as dark on
one and as bright on the other would be damage of a size and depth that no infarct has. How a b0 or T2 image is told from a DWI of low b by
the signal equation, S = S0 exp(-b ADC), is in docs/adr/0017-scale-contrast-hot-voxels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.prepare.brain import above_background
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.types import BoolArray, FloatArray, Modality

#: Thresholds for bright, dark and no signal, in units of each image's own tissue level.
_BRIGHT, _DARK, _NO_SIGNAL = 2.5, 0.5, 0.1
#: If more than this share of the brain is bright on "DWI" and dark on "ADC", it is not infarct but CSF on swapped images. Real images have
#: 0.001 at most (30 ml of infarct), and 0.06 to 0.25 when swapped.
_SWAPPED_SHARE, _SWAPPED_RATIO = 0.02, 3.0
#: If more than this share is dark on DWI and bright on ADC, it is CSF, not swapped. Swapped, it would be infarct, which rarely is so large.
_CSF_IN_PLACE = 0.004
#: Share of the brain that must be CSF for the test of an exponential ADC.
_MIN_CSF = 0.01
#: Slope of log signal over ADC, in ms/um^2 (= 1e3 s/mm^2), above which an image has no diffusion weighting. The slope of log S0 from tissue
#: to CSF, which has a longer T2, is 0.17 to 1.0 in simulated patients (0.65 at most for low b); subtracting b leaves 0.15 at b = 500.
#: The second limit is for the core of a brain alone, in which more voxels are pure CSF (0.26 at b = 500 in one of 150 patients).
_RISING, _CORE_RISING = 0.16, 0.32
#: Skull and scalp do not reach deeper than this.
_DEEP_MM = 20.0
#: Minimum share of the brain in its core, for the core to be used.
_MIN_CORE = 0.1
#: ADC of normal tissue (um^2/ms); in units of it: bin width, first bin, how far bins must and may reach. Voxels of a bin: fewest, enough.
_TISSUE_ADC, _BIN, _FIRST, _CSF, _LAST, _MIN_VOXELS, _ENOUGH_VOXELS = 0.8, 0.2, 1.3, 1.8, 5.0, 10, 300
#: Where DWI is dark, there is CSF: its ADC is 2-4 times the tissue level on a true map, and below this on an exponential one.
_EXPONENTIAL = 0.75
#: An image is clipped if more than this share of the brain has the highest value; clipping below the second level hides lesions.
_CLIPPED_SHARE, _LESIONS_HIDDEN = 0.005, 1.5
#: The brightest of a brain without a lesion (coil, cortex, susceptibility) still exceeds this level; logarithms do not.
_FLAT = 1.3
#: Negative values (in units of tissue) that interpolation can't cause in a DWI, and the largest share of the brain with such values (real
#: and simulated images: none).
_NEGATIVE, _NEGATIVE_SHARE = 0.5, 5e-4
#: Share of the brain in which an image is empty: above the first a note, above the second a refusal.
_SOME_EMPTY, _MOSTLY_EMPTY = 0.05, 0.2
#: A slice is lost if it has less than this share of what either side of it has, where the other image (or the whole brain) shows a section
#: of at least the second share of the largest one.
_LOST_SHARE, _SECTION_SHARE = 0.01, 0.25
#: How far (log) the level of a slice may typically be from the mean of its neighbours', before a note and a refusal: in patients it is far
#: less, but interleaved slices may disturb each other. Fewest slices for which this is asked.
_UNEVEN, _VERY_UNEVEN, _FEW_SLICES = 0.1, 0.2, 6


@dataclass(frozen=True)
class _Inside:
    """DWI and ADC within the brain, in units of their tissue level."""

    dwi: FloatArray
    adc: FloatArray


def check_plausibility(case: DraftCase) -> StepResult:
    """Raise InputRefused if DWI or ADC can't be what it is given as: swapped, clipped, negative, not diffusion-weighted."""
    where = f"{case.paths[Modality.DWI]}, {case.paths[Modality.ADC]}"
    deep = None if case.stripped and not case.rough_edge else _deep_part(case.brain, case.dwi.grid)
    return case, refuse_implausible(case.dwi.array, case.adc.array, case.brain, where, deep)


def refuse_implausible(
    dwi: FloatArray, adc: FloatArray, brain: BoolArray, where: str, core: BoolArray | None = None
) -> tuple[Note, ...]:
    """Raise InputRefused if DWI and ADC (z, y, x) can't be what they claim; return notes on what is only unusual.

    Args:
        dwi, adc: on one grid, in any unit.
        brain: bool, on the same grid.
        where: the files, for messages.
        core: the part of it that holds no skull, should `brain` hold one: fat would decide what tissue is.
    """
    inside = _Inside(_in_levels(dwi, brain), _in_levels(adc, brain))
    empty = _refuse_empty(dwi, adc, brain, where)
    _refuse_lost_slices(dwi, adc, brain, where)
    _refuse_negative(inside.dwi, where)
    _refuse_swapped(inside, where)
    _refuse_unweighted(_rise(inside, dwi, adc, brain, core), where)
    _refuse_exponential(_Inside(*_core(dwi, adc, brain)), where)
    uneven = _refuse_uneven_slices(dwi, adc, brain, where)
    return *empty, *uneven, *_refuse_clipped(dwi, brain, inside.dwi, where)


def _deep_part(brain: BoolArray, grid: Grid) -> BoolArray:
    """Return the part of a brain deep enough to exclude any remaining skull."""
    deep = np.zeros_like(brain)
    (box,) = ndimage.find_objects(brain.astype(np.uint8))
    depth = ndimage.distance_transform_edt(np.pad(brain[box], 1), grid.spacing_zyx_mm)
    deep[box] = depth[1:-1, 1:-1, 1:-1] > _DEEP_MM
    return deep


def tissue_level(image: FloatArray, brain: BoolArray) -> float:
    """Return the most frequent value in the brain (smoothed histogram around the median); 0 if no value is positive."""
    values = image[brain & (image > 0)]
    if values.size == 0:
        return 0.0
    median = float(np.median(values))
    counts, edges = np.histogram(values, bins=160, range=(0.2 * median, 2.2 * median))
    peak = int(ndimage.gaussian_filter1d(counts.astype(float), 4.0).argmax())
    return float((edges[peak] + edges[peak + 1]) / 2)


def _in_levels(image: FloatArray, brain: BoolArray, part: BoolArray | None = None) -> FloatArray:
    level = tissue_level(image, brain)
    values = image[brain if part is None else part].astype(np.float32)
    return values / np.float32(level) if level > 0 else np.zeros_like(values)


def _core(dwi: FloatArray, adc: FloatArray, brain: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return both images away from the brain's rim, which interpolation and stripping darken."""
    core = ndimage.binary_erosion(brain, ndimage.generate_binary_structure(3, 1), iterations=2)
    return _in_levels(dwi, brain, core), _in_levels(adc, brain, core)


def _refuse_empty(dwi: FloatArray, adc: FloatArray, brain: BoolArray, where: str) -> list[Note]:
    notes = []
    for modality, image in ((Modality.DWI, dwi), (Modality.ADC, adc)):
        empty = float((image[brain] <= 0).mean())
        if empty > _MOSTLY_EMPTY:
            raise InputRefused(
                "DWI and ADC show different parts of the head",
                where=where,
                found=f"{modality.label} is empty in {empty:.0%} of the region that either image shows; "
                f"at most {_MOSTLY_EMPTY:.0%} is accepted",
                do="give complete images of the same examination, both with the skull or both without",
            )
        if empty > _SOME_EMPTY:
            notes.append(Note(f"{modality.label} is 0 or negative in {empty:.0%} of the brain", modality))
    return notes


def _refuse_lost_slices(dwi: FloatArray, adc: FloatArray, brain: BoolArray, where: str) -> None:
    """Raise InputRefused if a slice within the brain is empty in one image, or, along the first axis, in both."""
    seen = {Modality.DWI: brain & above_background(dwi), Modality.ADC: brain & above_background(adc)}
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        sections = brain.sum(axis=others)
        for modality, image in seen.items():
            shown = image.sum(axis=others)
            before, after = np.maximum.accumulate(shown), np.maximum.accumulate(shown[::-1])[::-1]
            gap = np.minimum(before, after)
            expected = gap if axis == 0 else np.minimum(gap, sections)
            lost = (shown < _LOST_SHARE * expected) & (expected >= _SECTION_SHARE * sections.max())
            if lost.any():
                numbers = ", ".join(str(number + 1) for number in np.flatnonzero(lost)[:8])
                raise InputRefused(
                    f"the {modality.label} image has empty slices within the brain",
                    where=where,
                    found=f"slice {numbers} of {len(lost)} along {'zyx'[axis]}",
                    do="export it again, with all its slices",
                )


def _refuse_uneven_slices(dwi: FloatArray, adc: FloatArray, brain: BoolArray, where: str) -> tuple[Note, ...]:
    """Raise InputRefused if slices are scaled each by its own factor; return a note where they are only somewhat uneven."""
    notes = []
    for modality, step in slice_steps(dwi, adc, brain).items():
        found = f"slices typically differ from their neighbours by a factor of {np.exp(step):.2f}"
        if step > _VERY_UNEVEN:
            raise InputRefused(
                f"the slices of the {modality.label} image are not scaled alike",
                where=where,
                found=f"{found}, at most {np.exp(_VERY_UNEVEN):.2f} is accepted",
                do="export it again with its original values, each slice with its own rescale slope applied",
            )
        if step > _UNEVEN:
            notes.append(Note(f"{modality.label}: {found}", modality))
    return tuple(notes)


def slice_steps(dwi: FloatArray, adc: FloatArray, brain: BoolArray) -> dict[Modality, float]:
    """Return for DWI and ADC (z, y, x) how far (log) the level of a slice typically is from its neighbours', along the worst axis."""
    level = tissue_level(adc, brain)
    tissue = brain & (np.abs(adc - level) < 0.4 * level)
    return {
        modality: max(_unevenness(image, where & (image > 0), axis) for axis in range(3))
        for modality, image, where in ((Modality.DWI, dwi, tissue), (Modality.ADC, adc, brain))
    }


def _unevenness(image: FloatArray, seen: BoolArray, axis: int) -> float:
    """Return how far (log) the median of a slice typically lies from the mean of its two neighbours'; 0 for few slices."""
    counts = seen.sum(axis=tuple({0, 1, 2} - {axis}))
    slices = np.flatnonzero(counts > 0.1 * counts.max(initial=1))
    if len(slices) < _FEW_SLICES:
        return 0.0
    values, there = np.moveaxis(image, axis, 0), np.moveaxis(seen, axis, 0)
    levels = np.log([float(np.median(values[number][there[number]])) for number in slices])
    together = np.diff(slices[:-1]) + np.diff(slices[1:]) == 2
    steps = np.abs(levels[1:-1] - (levels[:-2] + levels[2:]) / 2)[together]
    return float(np.median(steps)) if steps.size else 0.0


def _refuse_negative(dwi: FloatArray, where: str) -> None:
    """Raise InputRefused if the brightest values of the DWI are negative: magnitudes never are, and lesions would be lost."""
    share = float((dwi < -_NEGATIVE).mean())
    if share > _NEGATIVE_SHARE:
        raise InputRefused(
            "the DWI has negative values, although it should be a magnitude image",
            where=where,
            found=f"{share:.2%} of the brain is clearly negative, at most {_NEGATIVE_SHARE:.2%} is accepted; "
            f"the lowest value is {float(dwi.min()):.3g} times typical tissue",
            do="export it again with the scanner's original values; a usual cause is 16-bit overflow (values above 32767 become negative)",
        )


def _refuse_swapped(inside: _Inside, where: str) -> None:
    damage_like = float(((inside.dwi > _BRIGHT) & (inside.adc < _DARK)).mean())
    csf_like = float(((inside.adc > _BRIGHT) & (inside.dwi < _DARK)).mean())
    if damage_like > _SWAPPED_SHARE and csf_like < min(_CSF_IN_PLACE, damage_like / _SWAPPED_RATIO):
        raise InputRefused(
            "DWI and ADC look swapped",
            where=where,
            found=f"{damage_like:.0%} of the brain is bright on DWI and dark on ADC, only {csf_like:.1%} the opposite, as CSF should be",
            do="exchange the two files: the ADC map as ADC, the diffusion-weighted image as DWI",
        )


def _rise(inside: _Inside, dwi: FloatArray, adc: FloatArray, brain: BoolArray, core: BoolArray | None) -> float:
    """Return `_rise_with_adc` of the brain, or of its core if that differs or is so high that it alone decides."""
    whole = _rise_with_adc(inside)
    if core is None or core.sum() < _MIN_CORE * brain.sum():
        return whole
    deep = _rise_with_adc(_Inside(_in_levels(dwi, core), _in_levels(adc, core)))
    return deep if deep > _CORE_RISING else min(whole, deep) if np.isfinite(deep) else whole


def _refuse_unweighted(rise: float, where: str) -> None:
    if rise > _RISING:
        raise InputRefused(
            "the DWI is not diffusion-weighted",
            where=where,
            found=f"its signal rises with ADC, by {rise:.0%} per 1e-3 mm^2/s: CSF is brighter than tissue, as on a b0 or T2 image "
            f"(at most {_RISING:.0%} is accepted)",
            do="give the image of b about 1000 s/mm^2, and the ADC map that was computed from it",
        )


def _rise_with_adc(inside: _Inside) -> float:
    """Return the slope of log DWI over ADC (ms/um^2) from tissue to CSF: slope of log S0, minus b; -inf if nothing is like CSF.

    Medians in bins of ADC, so that a few voxels of CSF count as much as many, and what shares a voxel with tissue counts too.
    """
    tissue = inside.dwi[np.abs(inside.adc - 1) < 0.25]
    level = float(np.median(tissue)) if tissue.size else 0.0
    used = (inside.adc > _FIRST - _BIN) & (inside.adc < _LAST) & (inside.dwi > 0.02 * level)
    if level <= 0 or not used.any():
        return -np.inf
    adc, log_signal = inside.adc[used], np.log(inside.dwi[used] / level)
    bins = np.floor(adc / _BIN).astype(int)
    points = [(np.median(adc[at]), np.median(log_signal[at]), at.sum()) for at in (bins == n for n in np.unique(bins))]
    beyond, rise, count = np.array([p for p in points if p[0] > _FIRST and p[2] >= _MIN_VOXELS] or [(0, 0, 0)]).T
    if len(beyond) < 2 or beyond.max() < _CSF:
        return -np.inf
    weight, beyond = np.sqrt(np.minimum(count, _ENOUGH_VOXELS)), beyond - 1
    return float((weight * beyond * rise).sum() / (weight * beyond**2).sum() / _TISSUE_ADC)


def _refuse_exponential(core: _Inside, where: str) -> None:
    dark = (core.dwi < _DARK) & (core.dwi > _NO_SIGNAL)  # bone and air say nothing
    if not dark.size or dark.mean() < _MIN_CSF:
        return
    level = float(np.median(core.adc[dark]))
    if level < _EXPONENTIAL:
        raise InputRefused(
            "the image given as ADC is not a map of diffusion coefficients",
            where=where,
            found=f"where DWI is dark, as in CSF, it has {level:.2f} times the value of tissue; at least {_EXPONENTIAL:g} is expected",
            do="give the ADC map, not the exponential one (eADC), a b0 or another DWI; if there is a skull, let it be stripped",
        )


def _refuse_clipped(dwi: FloatArray, brain: BoolArray, levels: FloatArray, where: str) -> tuple[Note, ...]:
    top = float(np.percentile(levels, 99.9))  # hot voxels may exceed the clipping level
    share = float((levels >= top).mean())
    if share < _CLIPPED_SHARE:
        flat = f"the brightest part of the DWI is only {top:.2f} times as bright as tissue: are these the scanner's values, not logarithms?"
        return (Note(flat, Modality.DWI),) if top < _FLAT else ()
    found = f"{share:.1%} of the brain has the highest value, {float(np.percentile(dwi[brain], 99.9)):g}, {top:.1f} times that of tissue"
    if top < _LESIONS_HIDDEN:
        raise InputRefused(
            "the DWI is clipped, so lesions can't be distinguished from tissue",
            where=where,
            found=found,
            do="export it again with its full range of values",
        )
    return (Note(f"the DWI is clipped: {found}", Modality.DWI),)
