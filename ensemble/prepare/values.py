"""The first checks: DWI and ADC exist, each image has finite and varying values, and no two are the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from ensemble.errors import InputRefused
from ensemble.prepare.brain import above_background
from ensemble.prepare.draft import DraftCase, StepResult, UnusableVoxels
from ensemble.prepare.hot_voxels import is_constant, unusable_voxel_mask
from ensemble.types import FloatArray, Modality

#: Share of an image's outer faces that must have one value to say what air has.
_ALL_AROUND = 0.9


def check_complete(case: DraftCase) -> StepResult:
    """Raise InputRefused for a case without DWI or ADC."""
    for modality in (Modality.DWI, Modality.ADC):
        if modality not in case.images:
            raise InputRefused(f"case {case.name} has no {modality.label} image", do="give both DWI and ADC")
    return case, ()


def check_values(case: DraftCase) -> StepResult:
    """Set unusable values to 0 for now (`background.zero_unusable_voxels` decides on them later).

    Raises InputRefused for images that are constant or have no finite value, and for a DWI with a bright background.
    """
    marked, images = {}, dict(case.images)
    for modality, image in case.images.items():
        bad = unusable_voxel_mask(image.array)
        if bad.all():
            raise InputRefused(
                f"the {modality.label} image has no finite value",
                where=case.paths[modality],
                found="every voxel is NaN or infinite",
                do="export it again",
            )
        if is_constant(image.array, ~bad):
            raise InputRefused(
                f"the {modality.label} image is constant",
                where=case.paths[modality],
                found=f"(almost) every voxel is {np.median(image.array[~bad]):g}",
                do="export the image again",
            )
        if modality is Modality.DWI and (level := _air_level(image.array)):
            raise InputRefused(
                f"the background of the {modality.label} image is as bright as tissue",
                where=case.paths[modality],
                found=f"nearly all voxels on the outer faces of the image are {level:g}",
                do="export it again with the scanner's original values (air near 0): these look shifted or inverted",
            )
        if bad.any():
            marked[modality] = UnusableVoxels(image.like(bad), int((bad & np.isfinite(image.array)).sum()))
            images[modality] = image.like(np.where(bad, np.float32(0), image.array))
    return replace(case, images=images, unusable=marked), ()


def check_distinct(case: DraftCase) -> StepResult:
    """Raise InputRefused if the same image is given for two modalities."""
    for first, second in combinations([modality for modality in Modality if modality in case.images], 2):
        if np.array_equal(case.images[first].array, case.images[second].array):
            raise InputRefused(
                f"{first.label} and {second.label} are the same image",
                where=case.paths[second],
                found=f"the same voxels as {case.paths[first]}",
                do="give each image its own file" + ", or run without FLAIR" * (second is Modality.FLAIR),
            )
    return case, ()


def _air_level(array: FloatArray) -> float:
    """Return the single value on nearly all of an image's outer faces (z, y, x) if it is as high as tissue; else 0."""
    faces = np.concatenate([array.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
    level = float(np.median(faces))
    if not level > 0 or (faces == level).mean() < _ALL_AROUND or not (array == level).any():
        return 0.0
    return level if above_background(array)[array == level].any() else 0.0
