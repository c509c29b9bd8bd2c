"""Check that an ADC map belongs to its DWI: they must share mutual information, and most of it at their present position.

Asked of the mutual information of their grey values within the brain, which knows nothing of contrast. It finds what is no picture of the
head (a mask, noise), and what a wrong header or conversion has mirrored or displaced; see docs/adr/0017-scale-contrast-hot-voxels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy import ndimage

from ensemble.errors import InputRefused
from ensemble.geometry import Triple
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality

#: Number of equally frequent grey levels to which each image is reduced.
_LEVELS = 16
#: Minimum mutual information (nats) of DWI and ADC; noise has 0, apart from bias. `benchmarks.margins` prints the values of patients.
_MIN_INFORMATION = 0.005
#: Test displacement (mm; less than half of it is not detected), and the factor by which another position must be better.
_STEP_MM, _BETTER = 6.0, 1.2
#: With less information (nats) than patients have, a map is another head's if its mirror image fits this well, relative to the map itself:
#: heads are alike, and so are each head and its mirror image (a DWI's own map: 0.32 at most). See `benchmarks.margins`.
_LITTLE_INFORMATION, _AS_WELL_MIRRORED = 0.1, 0.6
#: Smaller displacement (mm), which is only noted: the map may have been registered to another volume of the series.
_SMALL_STEP_MM = 2.0
#: Names of the mirror images, by axis.
_MIRRORED = tuple(f"mirrored along {name}" for name in "zyx")


def check_adc_belongs_to_dwi(case: DraftCase) -> StepResult:
    """Raise InputRefused for an ADC map that does not belong to the DWI."""
    where = f"{case.paths[Modality.DWI]}, {case.paths[Modality.ADC]}"
    return case, refuse_unrelated(case.dwi.array, case.adc.array, case.brain, case.dwi.grid.spacing_zyx_mm, where)


def refuse_unrelated(
    dwi: FloatArray, adc: FloatArray, brain: BoolArray, spacing_zyx_mm: Triple, where: str
) -> tuple[Note, ...]:
    """Raise InputRefused if DWI and ADC (z, y, x) share too little information, or more when ADC is mirrored or displaced.

    Returns a note where it seems to be displaced by little.
    """
    here, moves = mutual_information(dwi, adc, brain, spacing_zyx_mm)
    if here < _MIN_INFORMATION:
        raise InputRefused(
            "DWI and ADC do not belong together",
            where=where,
            found=f"mutual information of {max(here, 0):.3f} nats within the brain; at least {_MIN_INFORMATION} is expected",
            do="give the ADC map that was computed from this DWI, not a mask or another patient's map",
        )
    elsewhere = dict(moves)
    for how, there in elsewhere.items():
        if there > _BETTER * here:
            raise InputRefused(
                "the ADC map is mirrored or displaced relative to the DWI",
                where=where,
                found=f"it fits better {how}: mutual information {there:.3f} instead of {here:.3f} nats",
                do="check the conversion of both (orientation, order of slices), and give the ADC map that was computed from this DWI",
            )
    how, there = max(((how, there) for how, there in elsewhere.items() if how in _MIRRORED), key=lambda each: each[1])
    if here < _LITTLE_INFORMATION and there > _AS_WELL_MIRRORED * here:
        raise InputRefused(
            "DWI and ADC do not belong together",
            where=where,
            found=f"mutual information of {here:.3f} nats within the brain, {there:.3f} with ADC {how}, as between two heads",
            do="give the ADC map that was computed from this DWI, not another patient's, and check the orientation of both",
        )
    near = dict(mutual_information(dwi, adc, brain, spacing_zyx_mm, _SMALL_STEP_MM)[1])
    how = max(near, key=lambda each: near[each])
    if near[how] <= _BETTER * here:
        return ()
    found = f"mutual information {near[how]:.3f} instead of {here:.3f} nats"
    return (Note(f"ADC fits DWI better {how} ({found}): is a slice missing, or the header wrong?", Modality.ADC),)


def mutual_information(
    dwi: FloatArray, adc: FloatArray, brain: BoolArray, spacing_zyx_mm: Triple, step_mm: float = _STEP_MM
) -> tuple[float, Iterator[tuple[str, float]]]:
    """Return the mutual information (nats) of DWI and ADC (z, y, x) in the brain, and an iterator over its value at other positions.

    The iterator yields (description, nats) for the ADC map mirrored or shifted in each way.
    """
    (box,) = ndimage.find_objects(brain.astype(np.uint8))
    inside = brain[box] & (dwi[box] > 0) & (adc[box] > 0)
    one, other = _levels(dwi[box], inside), _levels(adc[box], inside)
    elsewhere = (
        (how, _shared(one, move(other), inside & move(inside))) for how, move in _moves(spacing_zyx_mm, step_mm)
    )
    return _shared(one, other, inside), elsewhere


def _moves(spacing_zyx_mm: Triple, step_mm: float) -> Iterator[tuple[str, Callable[[AnyArray], AnyArray]]]:
    """Yield mirrored and displaced versions of an array (z, y, x), with their names."""
    for axis, (name, mm) in enumerate(zip("zyx", spacing_zyx_mm, strict=True)):
        yield _MIRRORED[axis], partial(np.flip, axis=axis)
        step = max(1, round(step_mm / mm))
        for steps in (-step, step):
            yield f"moved by {steps * mm:.3g} mm along {name}", partial(_moved, steps=steps, axis=axis)


def _levels(image: FloatArray, inside: BoolArray) -> AnyArray:
    """Return the image quantised to equally frequent levels; voxels outside do not count."""
    values = image[inside]
    if not values.size:
        return np.zeros(image.shape, np.int64)
    limits = np.unique(np.percentile(values, np.linspace(0, 100, _LEVELS + 1)[1:-1]))
    return np.searchsorted(limits, image, "right")


def _shared(one: AnyArray, other: AnyArray, inside: BoolArray) -> float:
    """Return the mutual information (nats) of two quantised images, with the bias of chance removed (Miller 1955)."""
    counts = np.bincount(_LEVELS * one[inside] + other[inside], minlength=_LEVELS**2).reshape(_LEVELS, _LEVELS)
    if not (total := counts.sum()):
        return 0.0
    joint = counts / total
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    cells = (joint.sum(0) > 0).sum() - 1, (joint.sum(1) > 0).sum() - 1
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum() - cells[0] * cells[1] / (2 * total))


def _moved(array: AnyArray, steps: int, axis: int) -> AnyArray:
    """Return an array shifted along an axis and filled with 0."""
    moved = np.zeros_like(array)
    here, there = [slice(None)] * 3, [slice(None)] * 3
    here[axis], there[axis] = (
        (slice(None, -steps), slice(steps, None)) if steps > 0 else (slice(-steps, None), slice(None, steps))
    )
    moved[tuple(there)] = array[tuple(here)]
    return moved
