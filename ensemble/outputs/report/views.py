"""How slices are shown in pictures and pages: axial, radiological (the patient's left on the right), cropped to the brain."""

from __future__ import annotations

import numpy as np

from ensemble.pipeline import Result
from ensemble.text import escape_invisible
from ensemble.types import AnyArray, Modality

#: Display window in units of normal tissue (see `prepare/units.py`).
WINDOWS = {Modality.DWI: (0.0, 3.0), Modality.ADC: (0.0, 2.5), Modality.FLAIR: (0.0, 2.2)}


def case_headline(result: Result) -> str:
    """Return a title for pictures and pages: case name, number of lesions, their volume (ml), and how many small ones were left out."""
    count = result.lesion_count
    finding = "no lesion found" if count == 0 else f"{count} lesion{'s' * (count > 1)}, {result.lesion_ml:.2f} ml"
    if small := result.fused.small:
        finding += f"; {small} smaller lesion{'s' * (small > 1)} left out"
    if dropped := result.fused.dropped_components:
        finding += f"; {dropped} small disputed lesion{'s' * (dropped > 1)} left out"
    return escape_invisible(f"{result.case.name}: {finding}")


def brain_box(brain: AnyArray) -> tuple[slice, slice]:
    """Return the (y, x) slices that enclose the brain mask (z, y, x) in every axial slice, with a margin of 4 voxels."""
    ends = [np.flatnonzero(brain.any(axis=axes))[[0, -1]] for axes in ((0, 2), (0, 1))]
    rows, columns = (slice(max(int(low) - 4, 0), int(high) + 5) for low, high in ends)
    return rows, columns
