"""From signals at 1 mm to what a scanner delivers: partial volume, noise, distortion, an ADC map, a skull-stripped case."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.anatomy import Person, brain_hull
from training.artefacts import coil_shading, displace, ghost, susceptibility_shift
from training.draw import Draw
from training.lesions import Damage
from training.outlines import outline
from training.signals import (
    DiffusionProtocol,
    FlairProtocol,
    adc_from_signals,
    diffusion_attenuation,
    inversion_recovery,
    rician,
    spin_echo,
)
from training.tissues import ParameterMaps

# ISLES'22 grids and how many of 250 cases have them: voxel size in mm (z, y, x).
GRIDS_MM = (((2.0, 2.0, 2.0), 194), ((4.8, 1.8, 1.8), 29), ((4.8, 1.15, 1.15), 23), ((6.0, 1.5, 1.5), 4))
TISSUE_ADC = (0.5, 1.1)  # 1e-3 mm^2/s


@dataclass(frozen=True)
class Acquired:
    """A skull-stripped case on its DWI grid; each tensor (z, y, x), background 0."""

    dwi: Tensor  # arbitrary units
    adc: Tensor  # 1e-3 mm^2/s
    flair: Tensor  # arbitrary units
    lesion: Tensor  # uint8 0/1
    brain: Tensor  # bool
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    carried: Tensor | None = None  # (channels, z, y, x): shares of what else was to be brought along


def draw_spacing(draw: Draw) -> tuple[float, float, float]:
    """A voxel size as often as ISLES'22 has it."""
    at = draw.uniform(0, sum(count for _, count in GRIDS_MM))
    for spacing, count in GRIDS_MM:
        at -= count
        if at < 0:
            return spacing
    return GRIDS_MM[0][0]


def acquire(
    person: Person,
    healthy: ParameterMaps,
    damage: Damage,
    spacing_mm: tuple[float, float, float],
    draw: Draw,
    carried: Tensor | None = None,
    protocol: DiffusionProtocol | None = None,
) -> Acquired:
    """Scan a person: echo-planar b0 and DWI, ADC from both, FLAIR; then skull-strip.

    Args:
        healthy: the person's parameter maps without the damage.
        spacing_mm: voxel size (z, y, x) of the DWI grid.
        carried: maps (channels, z, y, x) on the person's grid that go where the signal goes: what lies where, say.
        protocol: of the DWI; drawn if None.
    """
    drawn = DiffusionProtocol(
        b_s_per_mm2=1000.0 if draw.chance(0.75) else draw.uniform(500, 1500),
        te_ms=draw.uniform(60, 105),
        tr_ms=draw.uniform(3500, 8000),
    )
    protocol = protocol or drawn
    hull = brain_hull(person.classes, draw)
    maps = damage.apply(healthy)
    signal = spin_echo(maps, protocol.te_ms, protocol.tr_ms)
    attenuated = signal * diffusion_attenuation(maps.adc, protocol.b_s_per_mm2)
    images = torch.stack([signal, attenuated, damage.acute, hull, *([] if carried is None else carried)])
    if draw.chance(0.9):
        images = displace(images, susceptibility_shift(hull, draw))
    images[:2] *= coil_shading(hull.shape, draw)
    b0, weighted, acute, mask, *others = to_voxels(images, spacing_mm)
    brain = mask > 0.5
    sigma = float(weighted[brain].median()) / draw.uniform(9, 35) * math.sqrt(protocol.directions)
    if draw.chance(0.3):
        strength = draw.uniform(0, 0.03)
        b0, weighted = ghost(b0, strength), ghost(weighted, strength)
    if draw.chance(0.1):
        weighted = weighted * (1 + 0.05 * draw.randn((weighted.shape[0], 1, 1)))  # slices disturbed by motion
    b0 = rician(b0, sigma, draw)
    weighted = rician(weighted, sigma, draw, protocol.directions)
    if draw.chance(0.6):
        smooth = draw.uniform(0.02, 0.16)
        b0, weighted = soften(b0, smooth), soften(weighted, smooth)
    adc = adc_from_signals(b0, weighted, protocol.b_s_per_mm2)
    flair = acquire_flair(maps, hull, spacing_mm, draw)
    level = tissue_median(weighted, adc, brain)
    lesion = outline(acute / mask.clamp_min(0.3), weighted / level, brain, spacing_mm, draw)
    along = torch.stack(others) if others else None
    return Acquired(weighted * brain, adc * brain, flair * brain, lesion, brain, spacing_mm, along)


def tissue_median(weighted: Tensor, adc: Tensor, brain: Tensor) -> float:
    """The DWI signal of normal tissue: the median where ADC (1e-3 mm^2/s) is that of tissue."""
    return float(weighted[brain & (adc > TISSUE_ADC[0]) & (adc < TISSUE_ADC[1])].median())


def acquire_flair(maps: ParameterMaps, hull: Tensor, spacing_mm: tuple[float, float, float], draw: Draw) -> Tensor:
    """FLAIR, scanned on its own grid (0.7 mm isotropic, or slices of 4.4-6 mm), resampled to the DWI grid; not quite registered."""
    signal = flair_signal(maps, hull, draw)
    slips = [round(draw.normal(0, 0.7)) for _ in range(3)]
    signal = torch.roll(signal, slips, (0, 1, 2))
    if draw.chance(0.5):
        thick = draw.uniform(4.4, 6.0)
        slices = F.interpolate(
            signal[None, None], size=(max(2, round(signal.shape[0] / thick)), *signal.shape[1:]), mode="area"
        )
        signal = F.interpolate(slices, size=signal.shape, mode="trilinear", align_corners=False)[0, 0]
    flair = to_voxels(signal[None], spacing_mm)[0]
    sigma = float(flair[flair > 0].median()) / draw.uniform(15, 50)
    return rician(flair, sigma, draw)


def flair_signal(maps: ParameterMaps, hull: Tensor, draw: Draw) -> Tensor:
    """FLAIR at 1 mm without noise, inside the brain's hull, by a random protocol and coil."""
    protocol = FlairProtocol(
        te_ms=draw.uniform(80, 140), tr_ms=draw.uniform(7000, 10000), ti_ms=draw.uniform(2250, 2600)
    )
    return inversion_recovery(maps, protocol) * coil_shading(hull.shape, draw) * hull


def to_voxels(images: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Average 1 mm images (channels, z, y, x) over the voxels of the acquisition grid: partial volume."""
    size = [max(1, round(n / s)) for n, s in zip(images.shape[1:], spacing_mm, strict=True)]
    return F.interpolate(images[None], size=size, mode="area")[0]


def soften(image: Tensor, share: float) -> Tensor:
    """In-plane blur by interpolation: `share` of each voxel goes to either neighbour along y and x."""
    for axis in (1, 2):
        image = (1 - 2 * share) * image + share * (torch.roll(image, 1, axis) + torch.roll(image, -1, axis))
    return image
