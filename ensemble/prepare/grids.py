"""ADC and FLAIR onto the DWI grid, as their headers say; headers are never overwritten.

FLAIR is registered besides (`registration.py`): it is taken minutes apart, and patients move.
"""

from __future__ import annotations

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import ROUNDING_VOXELS, Grid
from ensemble.prepare.brain import above_background
from ensemble.prepare.registration import register
from ensemble.readers.base import RawImage
from ensemble.resample import resample_volume, resample_within
from ensemble.types import BoolArray
from ensemble.volume import Volume

#: Share of the DWI's field of view that ADC must cover by its header to show the same place at all, and of the brain to be used.
MIN_ADC_OVERLAP, MIN_ADC_COVERAGE, WHOLE_ADC_COVERAGE = 0.3, 0.9, 0.999
#: FLAIR must cover at least this fraction of the brain to say anything about it; less than the second is remarked upon.
MIN_FLAIR_COVERAGE, WHOLE_FLAIR_COVERAGE = 0.5, 0.99


def adc_on_dwi_grid(adc: RawImage, dwi: RawImage, notes: list[str]) -> tuple[Volume, BoolArray]:
    """ADC (float32) on the DWI grid, and where it has data there. Raises InputRefused when it shows another place."""
    grid, there = dwi.volume.grid, adc.volume.grid
    apart = grid.distance_voxels(there)
    if apart <= ROUNDING_VOXELS:
        if apart > 1e-3:
            notes.append(f"ADC header differs from DWI by {apart:.3g} voxels: taken as rounding, the DWI header holds")
        return dwi.volume.like(adc.volume.array), np.ones(grid.shape_zyx, bool)
    covered = _covered(there, grid)
    if covered.mean() < MIN_ADC_OVERLAP:
        raise InputRefused(
            "DWI and ADC show different places",
            where=adc.path,
            found=f"ADC covers {covered.mean():.0%} of the DWI's field of view: ADC {there.describe()}; "
            f"DWI ({dwi.path.name}) {grid.describe()}",
            do="give the ADC map that was computed from this DWI",
        )
    if grid.same_lattice(there, ROUNDING_VOXELS):
        notes.append(f"ADC reordered to the DWI grid by its header, voxel for voxel (from {there.describe()})")
        return resample_volume(adc.volume, grid, linear=False), covered
    notes.append(f"ADC resampled onto the DWI grid by its header (linear, from {there.describe()})")
    return resample_within(adc.volume, above_background(adc.volume.array), grid), covered


def within_adc(brain: BoolArray, covered: BoolArray, adc: RawImage, notes: list[str]) -> BoolArray:
    """The part of the brain that ADC covers. Raises InputRefused when that is not most of it."""
    share = float(covered[brain].mean())
    if share < MIN_ADC_COVERAGE:
        raise InputRefused(
            "ADC does not cover the brain on DWI",
            where=adc.path,
            found=f"{share:.0%} of it",
            do="give the ADC map that was computed from this DWI",
        )
    if share < WHOLE_ADC_COVERAGE:
        notes.append(f"ADC covers only {share:.1%} of the brain: nothing is segmented elsewhere")
    return brain & covered


def flair_on_dwi_grid(flair: RawImage, dwi: Volume, brain: BoolArray, notes: list[str]) -> Volume:
    """FLAIR (float32) on the DWI grid: registered where that aligns it better than its header does. Raises InputRefused."""
    grid, there = dwi.grid, flair.volume.grid
    coverage = float(_covered(there, grid)[brain].mean())
    if coverage < MIN_FLAIR_COVERAGE:
        raise InputRefused(
            "FLAIR and DWI show different places",
            where=flair.path,
            found=f"FLAIR covers {coverage:.0%} of the brain on DWI: FLAIR {there.describe()}; DWI {grid.describe()}",
            do="give the FLAIR of this examination, or leave it out",
        )
    if coverage < WHOLE_FLAIR_COVERAGE:
        notes.append(f"FLAIR covers only {coverage:.0%} of the brain: 0 elsewhere")
    same = grid.distance_voxels(there) <= 1e-3
    by_header = dwi.like(flair.volume.array) if same else resample_volume(flair.volume, grid)
    found = register(flair.volume, by_header, dwi, brain)
    source = f"(linear, from {there.describe()})"
    if found.transform is not None:
        notes.append(f"FLAIR registered to DWI: {found.summary}; resampled {source}")
        return resample_volume(flair.volume, grid, transform=found.transform)
    if not same:
        notes.append(f"FLAIR resampled onto the DWI grid by its header {source}; registration: {found.summary}")
    return by_header


def _covered(there: Grid, grid: Grid) -> BoolArray:
    """Where on `grid` an image on the grid `there` has data: up to half a voxel beyond its outermost voxel centres."""
    everywhere = Volume(np.ones(there.shape_zyx, np.uint8), there)
    return resample_volume(everywhere, grid, linear=False).array > 0
