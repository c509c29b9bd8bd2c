"""Clean up outside the brain: non-finite values, noise, and the edges of the field of view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ensemble.errors import InputRefused
from ensemble.prepare.brain import above_background
from ensemble.prepare.draft import DraftCase, LazyVolume, Note, StepResult
from ensemble.resample import resample_volume
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume

#: Share of the voxels outside the brain that may be other than 0, as after interpolation at its rim; more is noise.
NOISY_BACKGROUND = 0.05
#: Area of brain on a face of the image from which on it is cut off.
_CUT_MM2 = 400.0


def zero_unusable_voxels(case: DraftCase) -> StepResult:
    """Keep non-finite or impossibly bright voxels at 0 if they lie outside tissue (ADC of air is 0/0). Raises InputRefused otherwise."""
    notes = []
    for modality, bad in case.unusable.items():
        other = case.adc if modality is Modality.DWI else case.dwi
        tissue = case.dwi.like(case.brain & above_background(other.array))
        count = int(bad.where.array.sum())
        what = (
            "NaN or infinite"
            if not bad.hot
            else "far brighter than any tissue"
            if bad.hot == count
            else "NaN, infinite or far too bright"
        )
        # tissue on the image's own grid: no bad voxel can slip between those of a coarser one
        there = resample_volume(tissue, bad.where.grid, linear=False).array
        if inside := int((there[bad.where.array] > 0).sum()):
            raise InputRefused(
                f"the {modality.label} image holds values that are {'not finite' if not bad.hot else 'impossible in tissue'}",
                where=case.paths[modality],
                found=f"{count} of {there.size} voxels are {what}, {inside} of them in brain tissue",
                do="export the image again",
            )
        notes.append(Note(f"{modality.label}: {count} voxels outside tissue were {what}: set to 0", modality))
    return case, tuple(notes)


def clear_background(case: DraftCase) -> StepResult:
    """Set voxels outside the brain to 0 in each image with a noisy background: members crop to and normalise by nonzero voxels.

    Members with published weights (SEALS, NVAUTO, SWAN) take `as_read` instead, whose background is that of their training. If the
    skull was stripped, `as_read` is 0 outside the brain, too.
    """
    notes, outside, images = [], ~case.brain, dict(case.images)
    as_read: dict[Modality, Volume | LazyVolume] = {**case.images, **case.as_read}
    for modality in (modality for modality in Modality if modality in case.images):
        image = case.images[modality]
        if case.stripped and modality not in case.as_read:
            as_read[modality] = _cleared(image, case.brain)
        noisy = float((image.array[outside] != 0).mean()) if outside.any() else 0.0
        if noisy > NOISY_BACKGROUND:
            images[modality] = _cleared(image, case.brain)
            text = f"{modality.label}: {noisy:.0%} of the background was not 0: set to 0"
            notes.append(Note(text, modality))
    return replace(case, images=images, as_read=as_read), tuple(notes)


def _cleared(image: Volume, brain: BoolArray) -> Volume:
    """Return the image with 0 outside the brain; the image itself if it is so already."""
    return image.like(np.where(brain, image.array, np.float32(0))) if image.array[~brain].any() else image


def note_cut_off_brain(case: DraftCase) -> StepResult:
    """Note a brain that is cut off by the field of view, except at the bottom, where the brain stem always leaves it."""
    canonical = case.dwi.grid.canonical()
    array = canonical.apply(case.brain)
    faces = {
        "top": array[-1],
        "front": array[:, 0],
        "back": array[:, -1],
        "right": array[:, :, 0],
        "left": array[:, :, -1],
    }
    spacing = canonical.spacing(case.dwi.grid.spacing_zyx_mm)
    areas = {"top": spacing[1] * spacing[2], "front": spacing[0] * spacing[2], "back": spacing[0] * spacing[2]}
    cut = [name for name, face in faces.items() if face.sum() * areas.get(name, spacing[0] * spacing[1]) > _CUT_MM2]
    text = f"the brain reaches the edge of the image ({', '.join(cut)}): the part beyond it is not segmented"
    return case, (Note(text),) if cut else ()
