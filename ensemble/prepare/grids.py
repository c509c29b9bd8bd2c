"""Resample ADC to the DWI grid as the headers say; headers are never overwritten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import ROUNDING_VOXELS, Grid
from ensemble.prepare.brain import above_background
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.resample import resample_volume, resample_within
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume

#: Share of the DWI's field of view that ADC must cover by its header to show the same place at all, and of the brain to be used.
MIN_ADC_OVERLAP, MIN_ADC_COVERAGE, WHOLE_ADC_COVERAGE = 0.3, 0.9, 0.999


def align_adc(case: DraftCase) -> StepResult:
    """Resample ADC (float32) to the DWI grid, and record where it has data.

    Raises InputRefused if it covers too little of the DWI's field of view.
    """
    adc, grid, there = case.adc, case.dwi.grid, case.adc.grid
    covered, text = np.ones(grid.shape_zyx, bool), ""
    apart = grid.distance_voxels(there)
    if apart <= ROUNDING_VOXELS:
        placed = case.dwi.like(adc.array)
        if apart > 1e-3:
            text = f"ADC header differs from DWI by {apart:.3g} voxels: treated as rounding, the DWI header is used"
    else:
        covered = field_of_view_mask(there, grid)
        if covered.mean() < MIN_ADC_OVERLAP:
            raise InputRefused(
                "ADC covers too little of the DWI's field of view",
                where=case.paths[Modality.ADC],
                found=f"ADC covers {covered.mean():.0%} of the DWI's field of view, at least {MIN_ADC_OVERLAP:.0%} is needed: "
                f"ADC {there.describe()}; "
                f"DWI ({case.paths[Modality.DWI].name}) {grid.describe()}",
                do="give the ADC map that was computed from this DWI",
            )
        if grid.same_lattice(there, ROUNDING_VOXELS):
            placed = resample_volume(adc, grid, linear=False)
            text = f"ADC reordered to the DWI grid by its header, voxel for voxel (from {there.describe()})"
        else:
            placed = resample_within(adc, above_background(adc.array), grid)
            text = f"ADC resampled onto the DWI grid by its header (linear, from {there.describe()})"
    return replace(case.with_image(Modality.ADC, placed), covered=covered), (Note(text, Modality.ADC),) if text else ()


def check_adc_coverage(case: DraftCase) -> StepResult:
    """Restrict the brain to where ADC has data. Raises InputRefused if ADC covers less than `MIN_ADC_COVERAGE` of it."""
    share = float(case.covered[case.brain].mean())
    if share < MIN_ADC_COVERAGE:
        raise InputRefused(
            "ADC does not cover enough of the brain on DWI",
            where=case.paths[Modality.ADC],
            found=f"ADC covers {share:.0%} of the brain, at least {MIN_ADC_COVERAGE:.0%} is needed",
            do="give the ADC map that was computed from this DWI",
        )
    text = f"ADC covers only {share:.1%} of the brain: nothing is segmented elsewhere"
    notes = (Note(text, Modality.ADC),) if share < WHOLE_ADC_COVERAGE else ()
    return replace(case, brain=case.brain & case.covered), notes


def field_of_view_mask(there: Grid, grid: Grid) -> BoolArray:
    """Return where on `grid` an image on the grid `there` has data: up to half a voxel beyond its outermost voxel centres."""
    everywhere = Volume(np.ones(there.shape_zyx, np.uint8), there)
    return resample_volume(everywhere, grid, linear=False).array > 0
