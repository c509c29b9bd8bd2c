"""Cheap changes to simulated cases while training: every time a case is seen, it was scanned a little differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.artefacts import rim_gain
from training.draw import Draw

DWI, ADC = 0, 1


def rescan(images: Tensor, draw: Draw) -> Tensor:
    """New artefacts, noise and contrast for a whole case (channels, z, y, x), y to anterior; background stays 0."""
    brain = (images[DWI] > 0).float()
    images = images.clone()
    if draw.chance(0.6):
        images[DWI] *= rim_gain(brain, draw)
    if draw.chance(0.4):
        for channel in range(images.shape[0]):
            if channel != ADC:
                knots = draw.randn((1, 1, 3, 3, 3))
                images[channel] *= torch.exp(0.07 * F.interpolate(knots, size=tuple(brain.shape), mode="trilinear")[0, 0])
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


def mirror(images: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Flip a case along any axes: files come in every orientation, and mirroring at inference needs it."""
    axes = [axis for axis in (1, 2, 3) if draw.chance(0.5)]
    return images.flip(axes), label.flip([axis - 1 for axis in axes])
