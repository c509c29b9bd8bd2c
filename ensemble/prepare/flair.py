"""Resample FLAIR to the DWI grid by its header, or also by registration (`registration.py`), because patients move between scans."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.draft import DraftCase, Note, StepResult
from ensemble.prepare.grids import field_of_view_mask
from ensemble.prepare.registration import RegistrationResult, register_rigidly
from ensemble.prepare.scale import refuse_implausible_brain
from ensemble.prepare.skull import must_strip
from ensemble.resample import resample_cubic, resample_volume
from ensemble.types import Modality
from ensemble.volume import Volume

if TYPE_CHECKING:
    import SimpleITK as sitk

#: FLAIR must cover at least this fraction of the brain to say anything about it; less than the second is remarked upon.
MIN_FLAIR_COVERAGE, WHOLE_FLAIR_COVERAGE = 0.5, 0.99
#: Voxel size (mm) up to which a brain's size is measured to a hundredth; voxels of 0.4 mm take ten times as long.
_SIZE_MM = 2.0
#: Fewest voxels that remain along an axis, whatever voxel size the header states.
_FEWEST = 32


def check_flair_size(case: DraftCase) -> StepResult:
    """Raise InputRefused for a skull-stripped FLAIR in which the brain has, by its header, an impossible size."""
    flair = case.images.get(Modality.FLAIR)
    if flair is not None and not case.stripped and not must_strip("auto", flair)[0]:
        coarse = _thinned(flair)
        shown = brain_mask(coarse.array, coarse.array)
        refuse_implausible_brain(shown, coarse.grid, "brain on FLAIR", case.paths[Modality.FLAIR], case.brain_ml)
    return case, ()


def _thinned(image: Volume) -> Volume:
    """Return every nth voxel along each axis where voxels are finer than the check of a brain's size needs."""
    grid = image.grid
    lengths = zip(grid.shape_zyx, grid.spacing_zyx_mm, strict=True)
    z, y, x = (max(1, min(int(_SIZE_MM / mm), count // _FEWEST)) for count, mm in lengths)
    array = image.array[::z, ::y, ::x]
    nz, ny, nx = array.shape
    spacing = (grid.spacing_mm[0] * x, grid.spacing_mm[1] * y, grid.spacing_mm[2] * z)
    return Volume(array, replace(grid, size=(nx, ny, nz), spacing_mm=spacing))


def align_flair(case: DraftCase) -> StepResult:
    """Resample FLAIR to the DWI grid, registered if that aligns it better than its header.

    Published members know it interpolated by cubic B-splines (docs/adr/0019), the others linearly. Raises InputRefused if it covers too
    little of the brain.
    """
    flair = case.images.get(Modality.FLAIR)
    if flair is None:
        return case, ()
    grid, there, notes = case.dwi.grid, flair.grid, []
    coverage = float(field_of_view_mask(there, grid)[case.brain].mean())
    if coverage < MIN_FLAIR_COVERAGE:
        raise InputRefused(
            "FLAIR covers too little of the brain on DWI",
            where=case.paths[Modality.FLAIR],
            found=f"FLAIR covers {coverage:.0%} of the brain on DWI, at least {MIN_FLAIR_COVERAGE:.0%} is needed: "
            f"FLAIR {there.describe()}; DWI {grid.describe()}",
            do="give the FLAIR of the same examination, or run without FLAIR",
        )
    if coverage < WHOLE_FLAIR_COVERAGE:
        notes.append(f"FLAIR covers only {coverage:.0%} of the brain: 0 elsewhere")
    same = grid.distance_voxels(there) <= 1e-3
    placed = case.dwi.like(flair.array) if same else resample_volume(flair, grid)
    if case.registration == "never":
        found = RegistrationResult(None, "not wanted (--registration never)")
    elif not case.flair_is_needed:
        found = RegistrationResult(None, "not needed, since no member takes FLAIR and no output shows it")
    else:
        found = register_rigidly(flair, placed, case.dwi, case.brain)
    source = f"(linear, from {there.describe()})"
    if found.transform is not None:
        notes.append(f"FLAIR registered to DWI: {found.summary}; resampled {source}")
        placed = resample_volume(flair, grid, transform=found.transform)
    elif not same:
        notes.append(f"FLAIR resampled onto the DWI grid by its header {source}; registration: {found.summary}")
    if found.transform is not None or not same:
        brain = case.dwi.like(case.brain) if case.stripped else None
        case = replace(case, as_read={Modality.FLAIR: partial(_cubic, flair, grid, brain, found.transform)})
    return case.with_image(Modality.FLAIR, placed), tuple(Note(text, Modality.FLAIR) for text in notes)


def _cubic(flair: Volume, grid: Grid, brain: Volume | None, transform: sitk.Transform | None) -> Volume:
    """Resample FLAIR to the DWI grid by cubic B-splines.

    If the skull was stripped (`brain`), it is removed from FLAIR before resampling, so that ringing is that of a stripped image. Only
    published members request this image, since apart from registration it takes longest.
    """
    if brain is not None:
        back = transform.GetInverse() if transform is not None else None
        inside = resample_volume(brain, flair.grid, linear=False, transform=back).array > 0
        flair = flair.like(np.where(inside, flair.array, np.float32(0)))
    return resample_cubic(flair, grid, transform)
