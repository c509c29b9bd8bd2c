"""RawCase -> PreparedCase: every check that stands between a file and a network, and each repair on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import ndimage

from ensemble.config import RunConfig, SkullStrip
from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.prepare.agreement import refuse_unrelated
from ensemble.prepare.brain import above_background, brain_mask
from ensemble.prepare.grids import adc_on_dwi_grid, flair_on_dwi_grid, within_adc
from ensemble.prepare.hot import is_constant, unusable
from ensemble.prepare.plausibility import refuse_implausible
from ensemble.prepare.scale import refuse_no_brain, refuse_other_scale, refuse_two_scales
from ensemble.prepare.skull import must_strip, remark_on_edges, strip
from ensemble.prepare.units import physical_intensities
from ensemble.readers.base import RawCase, RawImage
from ensemble.resample import resample_volume
from ensemble.types import BoolArray, FloatArray, Modality
from ensemble.volume import Volume

#: Share of the voxels outside the brain that may be other than 0, as after interpolation at its rim; more is noise.
NOISY_BACKGROUND = 0.05
#: What lies deeper than this is no skull and no scalp.
_CORE_MM = 20.0


@dataclass(frozen=True)
class PreparedCase:
    """All images of a case on the DWI grid, checked."""

    name: str
    images: Mapping[Modality, Volume]
    """float32, intensities as read."""
    physical: Mapping[Modality, Volume]
    """float32, normalised by tissue: 1 is normal brain (see `prepare/units.py`), 0 is outside the brain."""
    brain: Volume
    """bool, the brain's foreground."""
    repairs: tuple[str, ...]
    """What was changed on the way, or looks odd, one sentence each."""

    @property
    def grid(self) -> Grid:
        """The DWI grid, on which everything lies and the mask is written."""
        return self.images[Modality.DWI].grid

    @property
    def modalities(self) -> frozenset[Modality]:
        """Which images the case has."""
        return frozenset(self.images)


def prepare(
    raw: RawCase,
    skull_strip: SkullStrip = "auto",
    device: str = "cpu",
    brain_ml: tuple[float, float] = RunConfig.brain_ml,
) -> PreparedCase:
    """Check a case and bring its images onto the DWI grid, without skull. Raises InputRefused when it can't be segmented safely.

    `device` is where HD-BET runs if it must ("cpu", "cuda"); without it, no network does. `brain_ml` is the volume that a brain may have.
    """
    notes = [note for image in raw.images.values() for note in image.notes]
    for modality in (Modality.DWI, Modality.ADC):
        if modality not in raw.images:
            raise InputRefused(
                f"case {raw.name} has no {modality.value.upper()} image", do="DWI and ADC are both needed"
            )
    finite = {modality: _finite(image, modality) for modality, image in raw.images.items()}
    dwi, adc = finite[Modality.DWI], finite[Modality.ADC]
    for first, second in combinations([modality for modality in Modality if modality in finite], 2):
        if np.array_equal(finite[first].volume.array, finite[second].volume.array):
            raise InputRefused(
                f"{first.value.upper()} and {second.value.upper()} are the same image",
                where=finite[second].path,
                found=f"the voxels of {finite[first].path}",
                do="give each image its own file" + ", or leave FLAIR out" * (second is Modality.FLAIR),
            )
    for modality, image in finite.items():
        refuse_other_scale(image, modality, brain_ml)
    refuse_two_scales(adc, dwi)
    adc_volume, covered = adc_on_dwi_grid(adc, dwi, notes)
    stripped = must_strip(skull_strip, dwi.volume, notes)
    brain = strip(dwi.volume, device, notes, dwi.path, brain_ml) if stripped else _foreground(dwi, adc_volume)
    brain = within_adc(brain, covered, adc, notes)
    core = None if stripped else _core(brain, dwi.volume.grid)
    refuse_implausible(dwi.volume.array, adc_volume.array, brain, f"{dwi.path}, {adc.path}", notes, core)
    refuse_no_brain(brain, dwi.volume.grid, "brain", dwi.path, brain_ml, notes)
    refuse_unrelated(
        dwi.volume.array, adc_volume.array, brain, dwi.volume.grid.spacing_zyx_mm, f"{dwi.path}, {adc.path}"
    )
    if not stripped and Modality.FLAIR in finite:
        _refuse_flair_of_no_brain(finite[Modality.FLAIR], brain_ml)
    volumes = {Modality.DWI: dwi.volume, Modality.ADC: adc_volume}
    if Modality.FLAIR in finite:
        volumes[Modality.FLAIR] = flair_on_dwi_grid(finite[Modality.FLAIR], dwi.volume, brain, notes)
    for modality, image in raw.images.items():
        other = volumes[Modality.ADC if modality is Modality.DWI else Modality.DWI]
        tissue = dwi.volume.like(brain & above_background(other.array))
        _repair_or_refuse_not_numbers(image, modality, tissue, notes)
    images = {m: volume.like(_background_cleared(volume.array, brain, m, notes)) for m, volume in volumes.items()}
    remark_on_edges(dwi.volume.like(brain), notes)
    arrays = {modality: volume.array for modality, volume in images.items()}
    physical = physical_intensities(arrays[Modality.DWI], arrays[Modality.ADC], arrays.get(Modality.FLAIR), brain)
    return PreparedCase(
        name=raw.name,
        images=images,
        physical={modality: dwi.volume.like(array) for modality, array in physical.items()},
        brain=dwi.volume.like(brain),
        repairs=tuple(notes),
    )


def _finite(image: RawImage, modality: Modality) -> RawImage:
    """The image with 0 for what is no number, or none of a head, for now. Raises InputRefused for images that hold no picture."""
    array, label = image.volume.array, modality.value.upper()
    good = ~unusable(array)
    if not good.any():
        raise InputRefused(
            f"the {label} image holds values that are not numbers",
            where=image.path,
            found="every voxel is NaN or infinite",
            do="export it again",
        )
    if is_constant(array, good):
        raise InputRefused(
            f"the {label} image is constant",
            where=image.path,
            found=f"every voxel is {np.median(array[good]):g}, or all but a few",
            do="check the export",
        )
    return image if good.all() else replace(image, volume=image.volume.like(np.where(good, array, np.float32(0))))


def _repair_or_refuse_not_numbers(image: RawImage, modality: Modality, tissue: Volume, notes: list[str]) -> None:
    """Values that are no numbers, or hot, are 0 where there is no tissue, as an ADC of air is 0/0; in tissue, they refuse the case."""
    bad = unusable(image.volume.array)
    if not bad.any():
        return
    label, count = modality.value.upper(), int(bad.sum())
    hot = int((bad & np.isfinite(image.volume.array)).sum())
    what = (
        "NaN or infinite"
        if not hot
        else "far hotter than any tissue"
        if hot == count
        else "NaN, infinite or far too hot"
    )
    # tissue on the image's own grid: no bad voxel can slip between those of a coarser one
    inside = int((resample_volume(tissue, image.volume.grid, linear=False).array[bad] > 0).sum())
    if inside:
        raise InputRefused(
            f"the {label} image holds values that are {'not numbers' if not hot else 'none of tissue'}",
            where=image.path,
            found=f"{count} of {bad.size} voxels are {what}, {inside} of them in brain tissue",
            do="export it again",
        )
    notes.append(f"{label}: {count} voxels without tissue were {what}: set to 0")


def _background_cleared(array: FloatArray, brain: BoolArray, modality: Modality, notes: list[str]) -> FloatArray:
    """Zeros outside the brain, where much of it holds noise: members crop to, and normalise by, what is not 0."""
    outside = ~brain
    noisy = float((array[outside] != 0).mean()) if outside.any() else 0.0
    if noisy <= NOISY_BACKGROUND:
        return array
    notes.append(f"{modality.value.upper()}: {noisy:.0%} of what lies outside the brain was not 0: set to 0")
    return np.where(brain, array, np.float32(0))


def _refuse_flair_of_no_brain(flair: RawImage, brain_ml: tuple[float, float]) -> None:
    """Raise InputRefused for a FLAIR that is extracted too, and by its header of a size that no brain has."""
    if not must_strip("auto", flair.volume, []):
        shown = brain_mask(flair.volume.array, flair.volume.array)
        refuse_no_brain(shown, flair.volume.grid, "brain on FLAIR", flair.path, brain_ml, [])


def _core(brain: BoolArray, grid: Grid) -> BoolArray:
    """What of a brain lies so deep that it is none of a skull, should that still be there."""
    core = np.zeros_like(brain)
    (box,) = ndimage.find_objects(brain.astype(np.uint8))
    depth = ndimage.distance_transform_edt(np.pad(brain[box], 1), grid.spacing_zyx_mm)
    core[box] = depth[1:-1, 1:-1, 1:-1] > _CORE_MM
    return core


def _foreground(dwi: RawImage, adc: Volume) -> BoolArray:
    brain = brain_mask(dwi.volume.array, adc.array)
    if not brain.any():
        raise InputRefused(
            "no brain was found in DWI and ADC", where=dwi.path, do="check that both images show the same head"
        )
    return brain
