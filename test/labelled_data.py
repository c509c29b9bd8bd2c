"""Data sets of small phantom patients with lesion masks, as they are published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from conftest import GRID, phantom_arrays, write_image
from ensemble.geometry import Grid
from ensemble.types import AnyArray, Modality

FLAIR_GRID = replace(GRID, size=(60, 72, 24), spacing_mm=(8 / 3, 8 / 3, 5.0))


def patient(number: int, grid: Grid = GRID) -> tuple[dict[Modality, AnyArray], AnyArray]:
    """A head with a lesion of its own place and size: images, and the mask (bool; z, y, x). The same on every grid of one extent."""
    draw = np.random.default_rng(number)
    at, radius = draw.uniform(-0.4, 0.4, 3), draw.uniform(0.12, 0.3)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape_zyx], indexing="ij")
    lesion = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < radius**2
    head = phantom_arrays(grid)[Modality.DWI] > 0
    csf = head & ~lesion & ((z / 0.3) ** 2 + (y / 0.4) ** 2 + (x / 0.12) ** 2 < 1)
    noise = 0.04 * draw.standard_normal(grid.shape_zyx)
    dwi = head * (1 + noise) * np.where(lesion, 600, np.where(csf, 90, 300))
    adc = head * (1 - noise) * np.where(lesion, 450, np.where(csf, 2800, 800))
    flair = head * (1 - noise) * np.where(lesion, 300, np.where(csf, 60, 200))
    images = {Modality.DWI: dwi, Modality.ADC: adc, Modality.FLAIR: flair}
    return {modality: image.astype(np.float32) for modality, image in images.items()}, lesion & head


def write_isles22(root: Path, numbers: Sequence[int], *, flair: bool = True) -> Path:
    """ISLES'22's release: rawdata and derivatives, sidecars, FLAIR on its own grid."""
    for number in numbers:
        subject = f"sub-strokecase{number:04d}"
        name, inner = f"{subject}_ses-0001", Path(subject, "ses-0001")
        images, lesion = patient(number)
        for modality in (Modality.DWI, Modality.ADC):
            write_image(images[modality], root / "rawdata" / inner / f"{name}_{modality.value}.nii.gz")
        if flair:
            image = patient(number, FLAIR_GRID)[0][Modality.FLAIR]
            write_image(image, root / "rawdata" / inner / f"{name}_FLAIR.nii.gz", FLAIR_GRID)
        said = {"Manufacturer": "Maker", "ManufacturersModelName": "Model", "MagneticFieldStrength": 3}
        (root / "rawdata" / inner / f"{name}_dwi.json").write_text(json.dumps(said))
        write_image(lesion.astype(np.uint8), root / "derivatives" / inner / f"{name}_msk.nii.gz")
    return root
