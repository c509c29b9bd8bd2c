"""Cases made of the template itself, somewhere else: their true place is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from ensemble.findings.registration import to_sitk_transform
from ensemble.findings.template import AtlasStructure, shipped_template
from ensemble.fusion import FusedPrediction
from ensemble.geometry import Grid
from ensemble.pipeline import Result
from ensemble.prepare.case import PreparedCase
from ensemble.readers.base import RawCase, RawImage
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality
from ensemble.volume import Volume

#: Template over head, and a nod.
SCALE, NOD_DEGREES = 1.12, 9.0


@cache
def true_matrix() -> FloatArray:
    """4x4, from the head to the template (LPS)."""
    angle = math.radians(NOD_DEGREES)
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    matrix[:3, :3] *= np.array([[1.0], [0.97], [1.03]]) * SCALE
    matrix[:3, 3] = (6.0, -12.0, 20.0)
    return matrix


GRID = Grid((50, 60, 36), (3.5, 3.5, 4.5), (-90.0, -90.0, -90.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


@cache
def raw() -> RawCase:
    """DWI and ADC (1e-6 mm^2/s) of the head: tissue and CSF, a little noise."""
    onto, transform = shipped_template(), to_sitk_transform(true_matrix())
    csf = onto.left[AtlasStructure.CSF] + onto.left[AtlasStructure.CSF][..., ::-1]
    there = resample_volume(onto.t1.like(csf), GRID, transform=transform).array
    brain = resample_volume(onto.t1.like(onto.hull.astype(np.float32)), GRID, transform=transform).array > 0.5
    noise = 1 + np.random.default_rng(2).normal(0, 0.03, brain.shape)
    dwi, adc = 300 * (1 - 0.65 * there) * noise * brain, 800 * (1 + 2.5 * there) * brain
    images = {Modality.DWI: dwi, Modality.ADC: adc}
    return RawCase(
        "template_head", {m: RawImage(Path(f"{m}.mha"), Volume(a.astype(np.float32), GRID)) for m, a in images.items()}
    )


@cache
def case() -> PreparedCase:
    """The head, prepared."""
    from ensemble.prepare.case import prepare_raw

    return prepare_raw(raw())


def ball(*centres_ras_mm: tuple[float, float, float], radius_mm: float = 7.0) -> BoolArray:
    """Balls about points of the template (RAS), on the head's grid."""
    index = np.moveaxis(np.indices(GRID.shape_zyx), 0, -1)[..., ::-1]
    points = (index @ GRID.affine[:3, :3].T + GRID.affine[:3, 3]) @ true_matrix()[:3, :3].T + true_matrix()[:3, 3]
    found = np.zeros(GRID.shape_zyx, bool)
    for x, y, z in centres_ras_mm:
        found |= np.linalg.norm(points - (-x, -y, z), axis=-1) <= radius_mm
    return found


def result(mask: AnyArray, of: PreparedCase | None = None) -> Result:
    """As if a mask had been found in the head."""
    of = of or case()
    like = of.tissue_normalized[Modality.DWI].like
    fused = FusedPrediction(like(mask > 0), like(mask.astype(np.float32)), like(mask.astype(np.uint8)), ("one",))
    return Result(of, (), fused, float(mask.sum()) * of.grid.voxel_ml, 1)


def under_header(of: PreparedCase, direction: AnyArray) -> PreparedCase:
    """The same voxels, with a header that turns or mirrors them."""
    turned = tuple((direction @ np.reshape(of.grid.direction, (3, 3))).ravel().tolist())
    grid = replace(of.grid, direction=turned)
    return replace(
        of,
        images={m: Volume(v.array, grid) for m, v in of.images.items()},
        tissue_normalized={m: Volume(v.array, grid) for m, v in of.tissue_normalized.items()},
        brain=Volume(of.brain.array, grid),
    )


def with_half(of: PreparedCase) -> PreparedCase:
    """The case with nothing on one side of the middle along x."""
    kept = np.zeros(of.grid.shape_zyx, bool)
    kept[:, :, : kept.shape[2] // 2] = True
    physical = {m: v.like(np.where(kept, v.array, 0)) for m, v in of.tissue_normalized.items()}
    return replace(of, tissue_normalized=physical, brain=of.brain.like(of.brain.array & kept))
