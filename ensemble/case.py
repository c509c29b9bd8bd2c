"""RawCase -> PreparedCase: every check that stands between a file and a network, and each repair on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.metrics import volume_ml
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.units import physical_intensities
from ensemble.readers.base import RawCase, RawImage
from ensemble.resample import resample_volume
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume

#: Headers of one acquisition that differ by less than this are the same but for rounding, in voxels.
ROUNDING_VOXELS = 0.05
#: Volume of a whole adult brain, in ml; what lies outside is worth a second look.
PLAUSIBLE_BRAIN_ML = (600.0, 2200.0)
#: FLAIR must cover at least this fraction of the brain to say anything about it; less than the second is remarked upon.
MIN_FLAIR_COVERAGE, WHOLE_FLAIR_COVERAGE = 0.5, 0.99


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


def prepare(raw: RawCase) -> PreparedCase:
    """Check a case and bring its images onto the DWI grid. Raises InputRefused when it can't be segmented safely."""
    repairs: list[str] = []
    for modality in (Modality.DWI, Modality.ADC):
        if modality not in raw.images:
            raise InputRefused(
                f"case {raw.name} has no {modality.value.upper()} image", do="DWI and ADC are both needed"
            )
    for modality, image in raw.images.items():
        _check_values(image, modality)
    dwi, adc = raw.images[Modality.DWI], raw.images[Modality.ADC]
    images = {Modality.DWI: dwi.volume, Modality.ADC: _adc_on_dwi_grid(adc, dwi, repairs)}
    brain = _brain(images, dwi, repairs)
    if Modality.FLAIR in raw.images:
        images[Modality.FLAIR] = _flair_on_dwi_grid(raw.images[Modality.FLAIR], dwi, brain, repairs)
    arrays = {modality: volume.array for modality, volume in images.items()}
    physical = physical_intensities(arrays[Modality.DWI], arrays[Modality.ADC], arrays.get(Modality.FLAIR), brain)
    return PreparedCase(
        name=raw.name,
        images=images,
        physical={modality: dwi.volume.like(array) for modality, array in physical.items()},
        brain=dwi.volume.like(brain),
        repairs=tuple(repairs),
    )


def _check_values(image: RawImage, modality: Modality) -> None:
    """Raise InputRefused for images that hold no picture."""
    array, label = image.volume.array, modality.value.upper()
    if bad := int(array.size - np.isfinite(array).sum()):
        raise InputRefused(
            f"the {label} image holds values that are not numbers",
            where=image.path,
            found=f"{bad} of {array.size} voxels are NaN or infinite",
            do="export it again, or replace them by 0 if they all lie outside the head",
        )
    if array.min() == array.max():
        raise InputRefused(
            f"the {label} image is constant",
            where=image.path,
            found=f"every voxel is {array.min():g}",
            do="check the export",
        )


def _adc_on_dwi_grid(adc: RawImage, dwi: RawImage, repairs: list[str]) -> Volume:
    apart = dwi.volume.grid.distance_voxels(adc.volume.grid)
    if not apart <= ROUNDING_VOXELS:
        raise InputRefused(
            "DWI and ADC lie on different grids",
            where=adc.path,
            found=f"ADC {_describe(adc.volume.grid)}; DWI ({dwi.path.name}) {_describe(dwi.volume.grid)}",
            do="give the ADC map that was computed from this DWI, or resample it onto the DWI",
        )
    if np.array_equal(dwi.volume.array, adc.volume.array):
        raise InputRefused(
            "DWI and ADC are the same image", where=adc.path, found=f"the voxels of {dwi.path}", do="give the ADC map"
        )
    if apart > 1e-3:
        repairs.append(f"ADC header differs from DWI by {apart:.3g} voxels: taken as rounding, the DWI header holds")
    return dwi.volume.like(adc.volume.array)


def _flair_on_dwi_grid(flair: RawImage, dwi: RawImage, brain: BoolArray, repairs: list[str]) -> Volume:
    grid = dwi.volume.grid
    if grid.distance_voxels(flair.volume.grid) <= 1e-3:
        return dwi.volume.like(flair.volume.array)
    everywhere = flair.volume.like(np.ones(flair.volume.array.shape, np.uint8))
    coverage = float(resample_volume(everywhere, grid, linear=False).array[brain].mean())
    if coverage < MIN_FLAIR_COVERAGE:
        raise InputRefused(
            "FLAIR and DWI show different places",
            where=flair.path,
            found=f"FLAIR covers {coverage:.0%} of the brain on DWI: FLAIR {_describe(flair.volume.grid)}; DWI {_describe(grid)}",
            do="give the FLAIR of this examination, or leave it out",
        )
    if coverage < WHOLE_FLAIR_COVERAGE:
        repairs.append(f"FLAIR covers only {coverage:.0%} of the brain: 0 elsewhere")
    repairs.append(f"FLAIR resampled onto the DWI grid by its header (linear, from {_describe(flair.volume.grid)})")
    return resample_volume(flair.volume, grid)


def _brain(images: Mapping[Modality, Volume], dwi: RawImage, repairs: list[str]) -> BoolArray:
    brain = brain_mask(images[Modality.DWI].array, images[Modality.ADC].array)
    if not brain.any():
        raise InputRefused(
            "no brain was found in DWI and ADC", where=dwi.path, do="check that both images show the same head"
        )
    volume, (low, high) = volume_ml(brain, dwi.volume.grid.spacing_zyx_mm), PLAUSIBLE_BRAIN_ML
    if not low <= volume <= high:
        hint = "is the skull still there?" if volume > high else "is part of the brain missing?"
        repairs.append(f"the foreground measures {volume:.0f} ml, a brain {low:.0f} to {high:.0f} ml: {hint}")
    return brain


def _describe(grid: Grid) -> str:
    size = " x ".join(map(str, grid.size))
    spacing = " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm)
    origin = ", ".join(f"{mm:.1f}" for mm in grid.origin_mm)
    return f"{size} voxels of {spacing} mm at ({origin}), axes {''.join(grid.axis_letters)}"
