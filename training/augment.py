"""Cheap changes to simulated cases while training: every time a case is seen, it was scanned a little differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.artefacts import box_of, rim_gain
from training.draw import Draw

DWI, ADC = 0, 1
CAPSULE = ((0.05, 0.0, 0.34), (0.2, 0.12, 0.07))  # place and spread in shares of the brain's box (z, y, |x|)


def rescan(images: Tensor, draw: Draw) -> Tensor:
    """New artefacts, noise and contrast for a whole case (channels, z, y, x), y to anterior; background stays 0."""
    brain = (images[DWI] > 0).float()
    images = images.clone()
    if draw.chance(0.6):
        images[DWI] *= rim_gain(brain, draw)
    if draw.chance(0.4):
        images = darken_capsule(images, brain, draw)
    if draw.chance(0.4):
        for channel in range(images.shape[0]):
            if channel != ADC:
                knots = draw.randn((1, 1, 3, 3, 3))
                images[channel] *= torch.exp(
                    0.07 * F.interpolate(knots, size=tuple(brain.shape), mode="trilinear")[0, 0]
                )
    if draw.chance(0.5):
        for channel in range(images.shape[0]):
            images[channel] = images[channel] ** draw.uniform(0.9, 1.12) * draw.uniform(0.94, 1.06)
    if draw.chance(0.35):
        for channel in range(images.shape[0]):
            images[channel] += draw.uniform(0, 0.09) * draw.randn(brain.shape)
    if draw.chance(0.15):
        share = draw.uniform(0.05, 0.2)
        for axis in (2, 3):
            images = (1 - 2 * share) * images + share * (torch.roll(images, 1, axis) + torch.roll(images, -1, axis))
    return images.clamp(0, 8) * brain


def darken_capsule(images: Tensor, brain: Tensor, draw: Draw) -> Tensor:
    """Both internal capsules: lower ADC and brighter DWI, alike on the two sides, as many healthy people have them."""
    centre, half = box_of(brain)
    axes = [(torch.arange(n, device=brain.device) - c) / h for n, c, h in zip(brain.shape, centre, half, strict=True)]
    at = [p + draw.normal(0, 0.06) for p in CAPSULE[0]]
    wide = [s * draw.lognormal(1.0, 0.3) for s in CAPSULE[1]]
    z, y = (torch.exp(-0.5 * ((axes[i] - at[i]) / wide[i]) ** 2) for i in (0, 1))
    x = torch.exp(-0.5 * ((axes[2].abs() - at[2]) / wide[2]) ** 2)
    place = z[:, None, None] * y[:, None] * x * (images[ADC] < 1.3)
    images[ADC] *= 1 - draw.uniform(0, 0.3) * place
    images[DWI] *= 1 + draw.uniform(0, 0.3) * place
    return images


def mirror(images: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Flip a case along any axes: files come in every orientation, and mirroring at inference needs it."""
    axes = [axis for axis in (1, 2, 3) if draw.chance(0.5)]
    return images.flip(axes), label.flip([axis - 1 for axis in axes])
