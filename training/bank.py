"""The bank: scans as the members see them, one `case_*.npz` each, whether they were simulated, or are patients of a data set.

Arrays are (z up, y to anterior, x to the left), tissue-normalised, cut to the brain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ensemble.geometry import Grid, Triple
from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, FloatArray, Modality
from ensemble.volume import Volume
from training.drafts import draft_of

ISOTROPIC_MM = (2.0, 2.0, 2.0)
CHANNELS = (Modality.DWI, Modality.ADC, Modality.FLAIR)


def canonical(case: PreparedCase) -> tuple[FloatArray, Triple]:
    """Physically normalised images (3: DWI, ADC, FLAIR; z, y, x) of a prepared case, and the voxel size (z, y, x) in mm.

    FLAIR is 0 everywhere where there is none.
    """
    turn = case.grid.canonical()
    empty = np.zeros(case.grid.shape_zyx, np.float32)
    arrays = [case.tissue_normalized[m].array if m in case.tissue_normalized else empty for m in CHANNELS]
    return anterior(turn.apply(np.stack(arrays))), turn.spacing(case.grid.spacing_zyx_mm)


def anterior(lps: AnyArray) -> AnyArray:
    """LPS arrays (..., z, y, x) with y to anterior, as the simulator has them."""
    return lps[..., ::-1, :].copy()


def anterior_grid(shape_zyx: Sequence[int], spacing_mm: Sequence[float]) -> Grid:
    """The grid of such arrays, of this voxel size (z, y, x), with its origin at 0."""
    (depth, height, width), (z, y, x) = shape_zyx, spacing_mm
    return Grid((width, height, depth), (x, y, z), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))


def cut(stack: AnyArray, label: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Images (channels, z, y, x) and label (z, y, x) in the box of what is brain on DWI, or lesion."""
    inside = (stack[0] > 0) | (label > 0)
    box = tuple(
        slice(int(np.flatnonzero(inside.any(a))[0]), int(np.flatnonzero(inside.any(a))[-1]) + 1)
        for a in ((1, 2), (0, 2), (0, 1))
    )
    return stack[(slice(None), *box)], label[box]


def write(path: Path, stack: AnyArray, label: AnyArray, spacing_mm: Sequence[float], **about: Any) -> Path:
    """One scan as an uncompressed .npz, complete or not there at all: native grid, and 2 mm where that differs.

    Args:
        stack: tissue-normalised images (3: DWI, ADC, FLAIR; z, y, x), 0 outside the brain.
        label: lesion (z, y, x).
        spacing_mm: voxel size (z, y, x).
        about: what else is stored: `patient` says whose scan it is.
    """
    images, lesion = cut(stack.astype(np.float16), label.astype(np.uint8))
    content: dict[str, Any] = {
        "images": images,
        "label": lesion,
        "spacing_mm": np.array(spacing_mm, np.float32),
    }
    if tuple(spacing_mm) != ISOTROPIC_MM:
        content["images_2mm"], content["label_2mm"] = isotropic(images, lesion, spacing_mm)
    with draft_of(path) as draft:
        np.savez(draft, **content | about)
    return path


def isotropic(stack: AnyArray, label: AnyArray, spacing_mm: Sequence[float]) -> tuple[AnyArray, AnyArray]:
    """Bring a scan to 2 mm as the members' preprocessing does (cubic for thin, nearest-slice for very thick slices)."""
    if tuple(spacing_mm) == ISOTROPIC_MM:
        return stack, label
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

    size = compute_new_shape(stack.shape[1:], spacing_mm, ISOTROPIC_MM)
    images = resample_data_or_seg_to_shape(
        stack.astype(np.float32), size, spacing_mm, ISOTROPIC_MM, is_seg=False, order=3, order_z=0
    )
    outline = torch.from_numpy(label[None, None].astype(np.float32))
    soft = F.interpolate(outline, size=tuple(int(n) for n in size), mode="trilinear", align_corners=False)[0, 0]
    return np.asarray(images, dtype=np.float16), (soft.numpy() > 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Scan:
    """The description of one scan of the bank, without its images."""

    path: Path
    patient: str
    """Scans of one patient are always in the same fold."""
    lesion_ml: float
    digest: str
    """SHA-256 over the normalised DWI: the same for copies of one image, whatever their file, orientation and unit."""
    real: bool
    """A patient of a data set, not of the simulator."""

    @property
    def name(self) -> str:
        """What the scan is called."""
        return self.path.stem.removeprefix("case_")


def scan(path: Path) -> Scan:
    """Read the description of one scan."""
    with np.load(path) as content:
        patient = str(content["patient"]) if "patient" in content else path.stem
        ml = float(content["label"].sum()) * float(np.prod(content["spacing_mm"])) / 1000
        return Scan(path, patient, ml, digest_of(content["images"]), bool(content.get("real", False)))


def digest_of(images: AnyArray) -> str:
    """Of images (3, z, y, x) that are cut to the brain."""
    brain, _ = cut(images, np.zeros(images.shape[1:], np.uint8))
    dwi = np.ascontiguousarray(brain[0], np.float16)
    return hashlib.sha256(str(dwi.shape).encode() + dwi.tobytes()).hexdigest()


def as_prepared(path: Path) -> tuple[PreparedCase, AnyArray]:
    """A scan as members are given it, on a grid of its own, and its lesion (bool; z, y, x)."""
    with np.load(path) as content:
        stack, label = content["images"].astype(np.float32), content["label"] > 0
        spacing_mm = [round(float(mm), 5) for mm in content["spacing_mm"]]
    grid = anterior_grid(label.shape, spacing_mm)
    images = {m: Volume(image, grid) for m, image in zip(CHANNELS, stack, strict=True) if image.any()}
    brain = Volume(stack[0] > 0, grid)
    return PreparedCase(path.stem.removeprefix("case_"), images, images, images, brain, ()), label
