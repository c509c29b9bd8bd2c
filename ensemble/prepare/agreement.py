"""Check that an ADC map belongs to its DWI: they must share mutual information, and most of it at their present position.

Asked of the mutual information of their grey values within the brain, which knows nothing of contrast. It finds what is no picture of the
head (a mask, noise), and what a wrong header or conversion has mirrored or displaced; see docs/adr/0017-scale-contrast-hot-voxels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
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


class AdcMove(Enum):
    """How an ADC map is moved to see whether it fits the DWI better elsewhere."""

    MIRRORED = auto()
    SHIFTED = auto()
    """By about `_STEP_MM`."""
    SHIFTED_SLIGHTLY = auto()
    """By about `_SMALL_STEP_MM`."""


@dataclass(frozen=True)
class MovedAdc:
    """The fit of the moved ADC map."""

    move: AdcMove
    how: str
    """In words, to follow "it fits better"."""
    nats: float
    """Mutual information with the DWI."""


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
    elsewhere = list(moves)
    for moved in elsewhere:
        if moved.move is not AdcMove.SHIFTED_SLIGHTLY and moved.nats > _BETTER * here:
            raise InputRefused(
                "the ADC map is mirrored or displaced relative to the DWI",
                where=where,
                found=f"it fits better {moved.how}: mutual information {moved.nats:.3f} instead of {here:.3f} nats",
                do="check the conversion of both (orientation, order of slices), and give the ADC map that was computed from this DWI",
            )
    best = max((moved for moved in elsewhere if moved.move is AdcMove.MIRRORED), key=lambda moved: moved.nats)
    if here < _LITTLE_INFORMATION and best.nats > _AS_WELL_MIRRORED * here:
        raise InputRefused(
            "DWI and ADC do not belong together",
            where=where,
            found=f"mutual information of {here:.3f} nats within the brain, {best.nats:.3f} with ADC {best.how}, as between two heads",
            do="give the ADC map that was computed from this DWI, not another patient's, and check the orientation of both",
        )
    best = max(elsewhere, key=lambda moved: moved.nats)  # only a slight shift can be that much better by now
    if best.nats <= _BETTER * here:
        return ()
    found = f"mutual information {best.nats:.3f} instead of {here:.3f} nats"
    return (Note(f"ADC fits DWI better {best.how} ({found}): is a slice missing, or the header wrong?", Modality.ADC),)


def mutual_information(
    dwi: FloatArray, adc: FloatArray, brain: BoolArray, spacing_zyx_mm: Triple
) -> tuple[float, Iterator[MovedAdc]]:
    """Return the mutual information (nats) of DWI and ADC (z, y, x) in the brain, and an iterator over the fits of the moved ADC map."""
    (box,) = ndimage.find_objects(brain.astype(np.uint8))
    inside = brain[box] & (dwi[box] > 0) & (adc[box] > 0)
    one, other = _levels(dwi[box], inside), _levels(adc[box], inside)
    elsewhere = (
        MovedAdc(kind, how, _shared(one, move(other), inside & move(inside)))
        for kind, how, move in _moves(spacing_zyx_mm)
    )
    return _shared(one, other, inside), elsewhere


def _moves(spacing_zyx_mm: Triple) -> Iterator[tuple[AdcMove, str, Callable[[AnyArray], AnyArray]]]:
    """Yield mirrored and shifted versions of an array (z, y, x), with their kind and name; slight shifts last."""
    slight = []
    for axis, (name, mm) in enumerate(zip("zyx", spacing_zyx_mm, strict=True)):
        yield AdcMove.MIRRORED, f"mirrored along {name}", partial(np.flip, axis=axis)
        step, small = (max(1, round(length / mm)) for length in (_STEP_MM, _SMALL_STEP_MM))
        for steps in (-step, step):
            yield AdcMove.SHIFTED, *_shift(axis, name, mm, steps)
        if small != step:
            slight += [_shift(axis, name, mm, steps) for steps in (-small, small)]
    for how, move in slight:
        yield AdcMove.SHIFTED_SLIGHTLY, how, move


def _shift(axis: int, name: str, mm: float, steps: int) -> tuple[str, Callable[[AnyArray], AnyArray]]:
    return f"moved by {steps * mm:.3g} mm along {name}", partial(_moved, steps=steps, axis=axis)


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
