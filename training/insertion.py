"""Insert simulated lesions into a real brain: the simulator's signal model as factors on DWI, ADC and FLAIR."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.anatomy import blur, bounding_box, to_grid_sample
from training.draw import Draw
from training.lesions import (
    COUNT_PROBABILITIES,
    COUNTS,
    EMBOLUS_SPREAD,
    NOMINAL_TE_MS,
    NORMAL_ADC,
    NORMAL_T2_MS,
    SHOWER_COUNT,
    SHOWER_ML,
    VOLUME_ML,
    VOLUME_PROBABILITIES,
    LesionLibrary,
    LesionStage,
    draw_stage,
    embolus_radius_mm,
    near_volume,
    vary,
)
from training.outlines import outline

DWI, ADC, FLAIR = 0, 1, 2
LESION_FREE_SHARE, EMBOLI_ONLY_SHARE = 0.15, 0.45
CSF_FROM, CSF_FULLY = 1.3, 1.8  # ADC, times normal tissue
FLAIR_TE_MS = 110.0
Spacing = tuple[float, float, float]


def with_lesions(images: Tensor, spacing_mm: Spacing, library: LesionLibrary, draw: Draw) -> tuple[Tensor, Tensor]:
    """The brain with new infarcts, and the label (float 0/1; z, y, x) that a reader would draw.

    Args:
        images: (2 or 3: DWI, ADC, FLAIR; z, y, x), tissue-normalised, 0 outside the brain; y to anterior, x to the left.
        spacing_mm: (z, y, x).
    """
    images = images.clone()
    brain = images[DWI] > 0
    share = torch.zeros_like(images[DWI])
    if not draw.chance(LESION_FREE_SHARE):
        tissue = ((CSF_FULLY - images[ADC]) / (CSF_FULLY - CSF_FROM)).clamp(0, 1) * brain
        for where, stage, strength in _draw_lesions(tissue, brain, spacing_mm, library, draw):
            share = torch.maximum(share, where)
            _damage(images, where * strength, stage)
    label = outline(share, images[DWI], brain, spacing_mm, draw)
    return images, label.float()


def _draw_lesions(
    tissue: Tensor, brain: Tensor, spacing_mm: Spacing, library: LesionLibrary, draw: Draw
) -> list[tuple[Tensor, LesionStage, float]]:
    """Infarcts of one event: where (0-1), their age, and how severe."""
    stage = draw_stage(draw)
    if draw.chance(EMBOLI_ONLY_SHARE):
        volume_ml = min(max(draw.lognormal(SHOWER_ML[1], 1.0), SHOWER_ML[0]), SHOWER_ML[2])
        count = min(max(round(draw.lognormal(SHOWER_COUNT[1], 0.8)), SHOWER_COUNT[0]), SHOWER_COUNT[2])
        return _emboli(tissue, spacing_mm, count, embolus_radius_mm(volume_ml / count), stage, draw)
    volume_ml = draw.quantile(VOLUME_PROBABILITIES, VOLUME_ML)
    count = round(draw.quantile(COUNT_PROBABILITIES, COUNTS))
    strength = draw.uniform(0.5, 0.8) if draw.chance(0.15) else draw.uniform(0.85, 1.0)
    lesions = [(_shape(brain, spacing_mm, library, volume_ml, draw) * tissue, stage, strength)]
    if count > 1:
        lesions += _emboli(tissue, spacing_mm, count - 1, embolus_radius_mm(volume_ml / count, 2.0), stage, draw)
    return lesions


def _emboli(
    tissue: Tensor, spacing_mm: Spacing, count: int, radius_mm: float, stage: LesionStage, draw: Draw
) -> list[tuple[Tensor, LesionStage, float]]:
    """Lumpy ellipsoids in one territory or everywhere."""
    inside = torch.nonzero(tissue > 0.7)
    if len(inside) == 0:
        return []
    millimetres = torch.tensor(spacing_mm)
    pool = inside
    if draw.chance(0.6):
        hub = inside[draw.integer(0, len(inside))]
        pool = inside[((inside - hub) * millimetres).norm(dim=1) < draw.uniform(15, 45)]
    lesions = []
    for _ in range(count):
        centre = pool[draw.integer(0, len(pool))]
        radius = min(draw.lognormal(radius_mm, EMBOLUS_SPREAD), 8.0)
        strength = draw.uniform(0.5, 0.8) if draw.chance(0.2) else draw.uniform(0.85, 1.0)
        lesions.append((_ellipsoid(tissue, centre, radius, spacing_mm, draw), vary(stage, draw), strength))
    return lesions


def _ellipsoid(tissue: Tensor, centre: Tensor, radius_mm: float, spacing_mm: Spacing, draw: Draw) -> Tensor:
    reach = [math.ceil((1.8 * radius_mm + 2) / s) for s in spacing_mm]
    window = tuple(
        slice(max(0, int(c) - r), min(n, int(c) + r + 1)) for c, r, n in zip(centre, reach, tissue.shape, strict=True)
    )
    axes = [
        (torch.arange(s.start, s.stop, dtype=torch.float32) - float(c) + draw.uniform(-0.5, 0.5)) * mm
        for s, c, mm in zip(window, centre, spacing_mm, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    turn = torch.linalg.qr(draw.randn((3, 3)))[0]
    ratios = torch.tensor([draw.lognormal(1.0, 0.25) for _ in range(3)])
    distance = ((points @ turn) / (radius_mm * ratios)).norm(dim=-1) + 0.1 * draw.randn(points.shape[:3])
    edge_mm = float(np.mean(spacing_mm))
    where = torch.zeros_like(tissue)
    where[window] = ((1 - distance) * radius_mm / edge_mm + 0.5).clamp(0, 1) * tissue[window]
    return where


def _shape(brain: Tensor, spacing_mm: Spacing, library: LesionLibrary, volume_ml: float, draw: Draw) -> Tensor:
    """A real lesion's mask of about `volume_ml`, carried to this brain by its bounding box: 0-1, patchy."""
    mask = torch.from_numpy(library.mask(near_volume(library, volume_ml, draw)).copy()).float()
    if draw.chance(0.5):
        mask = mask.flip(2)
    coordinates = []
    for axis, box in enumerate(bounding_box(brain, 0)):
        first, last = library.brain_box[axis]
        index = torch.arange(brain.shape[axis], dtype=torch.float32)
        at = (index - box.start) / max(1, box.stop - 1 - box.start)
        at = (at - 0.5) * draw.lognormal(1.0, 0.06) + 0.5
        coordinates.append(first + at * (last - first) + draw.normal(0, 3.0))
    points = torch.stack(torch.meshgrid(*coordinates, indexing="ij"), dim=-1)
    points += 1.5 * _field(brain.shape, spacing_mm, 8.0, draw, 3).permute(1, 2, 3, 0)
    sampled = F.grid_sample(mask[None, None], to_grid_sample(points, mask.shape), align_corners=True)[0, 0]
    patchy = _field(brain.shape, spacing_mm, draw.uniform(4, 12), draw)[0].clamp(-1, 2).add(1).div(3)
    soft = blur(sampled, draw.uniform(0.5, 1.2))
    sharp = ((soft - 0.5) * draw.uniform(1.2, 3.0) + 0.5).clamp(0, 1)
    return sharp * (1 - draw.uniform(0.0, 0.35) * patchy)


def _field(shape: torch.Size, spacing_mm: Spacing, cell_mm: float, draw: Draw, channels: int = 1) -> Tensor:
    """A smooth random field (channels, z, y, x) on any grid, as `Draw.field` on 1 mm."""
    knots = [max(2, round(n * s / cell_mm) + 1) for n, s in zip(shape, spacing_mm, strict=True)]
    coarse = draw.randn([1, channels, *knots])
    return 1.5 * F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)[0]


def _damage(images: Tensor, severity: Tensor, stage: LesionStage) -> None:
    """Let tissue die, in place: ADC by its factor, DWI by -b dADC - TE d(1/T2), FLAIR by T2 alone."""
    healthy = images[ADC].clone()
    images[ADC] = healthy * torch.exp(math.log(stage.adc) * severity)
    t2_gain = 1 - torch.exp(-math.log(stage.t2) * severity)
    images[DWI] *= torch.exp(-NORMAL_ADC * (images[ADC] - healthy) + NOMINAL_TE_MS / NORMAL_T2_MS * t2_gain)
    if len(images) > FLAIR:
        images[FLAIR] *= torch.exp(FLAIR_TE_MS / NORMAL_T2_MS * t2_gain)
