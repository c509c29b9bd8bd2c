"""Augment simulated cases during training, cheaply: each time, a case is scanned a little differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.artefacts import box_of, rim_gain
from training.draw import Draw

DWI, ADC = 0, 1
SOLID = 1.3  # ADC of tissue, relative to normal; above lies CSF
Place = tuple[float, float, float]
CAPSULE = ((0.05, 0.0, 0.34), (0.2, 0.12, 0.07))  # place and spread in shares of the brain's box (z, y, |x|)


def rescan(images: Tensor, draw: Draw, *, artefacts: bool = True) -> Tensor:
    """New artefacts (unless the case has real ones), noise and contrast for a whole case (channels, z, y, x), y to anterior.

    The background stays 0, and so does an image that is 0 everywhere.
    """
    brain = (images[DWI] > 0).float()
    there = images.flatten(1).any(dim=1).view(-1, 1, 1, 1)  # an image that is missing stays so
    images = images.clone()
    if artefacts:
        _add_artefacts(images, brain, draw)
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
    return images.clamp(0, 8) * brain * there


def _add_artefacts(images: Tensor, brain: Tensor, draw: Draw) -> None:
    """What healthy brains show that looks like infarcts, in place.

    Brightness without a lower ADC is drawn rarely and faintly: subacute infarcts look so, and networks that met much of it missed them.
    """
    if draw.chance(0.6):
        gain, dimming = rim_gain(brain, draw)
        images[DWI] *= gain
        images[ADC] *= torch.where(images[ADC] < SOLID, dimming, 1.0)
    if draw.chance(0.4):
        darken_pair(images, brain, CAPSULE[0], CAPSULE[1], draw)
    for _ in range(draw.integer(1, 3) if draw.chance(0.5) else 0):
        place = (draw.uniform(-0.9, 0.7), draw.uniform(-0.95, 0.95), draw.uniform(0.0, 0.85))
        spread = (draw.uniform(0.04, 0.25), draw.uniform(0.04, 0.25), draw.uniform(0.05, 0.2))
        darken_pair(images, brain, place, spread, draw)
    for _ in range(draw.integer(1, 3) if draw.chance(0.35) else 0):
        place = (draw.uniform(-0.7, 0.7), draw.uniform(-0.8, 0.8), draw.uniform(0.05, 0.85))
        brighten_pair(images, brain, place, draw)


def darken_pair(images: Tensor, brain: Tensor, place: Place, spread: Place, draw: Draw) -> None:
    """Lower ADC and brighter DWI at a place and its mirror image, in solid tissue, in place.

    Both internal capsules look so in many healthy people.
    """
    blob = paired_blob(brain, place, spread, draw) * (images[ADC] < SOLID)
    images[ADC] *= 1 - draw.uniform(0, 0.35) * blob
    images[DWI] *= 1 + draw.uniform(0, 0.3) * blob


def brighten_pair(images: Tensor, brain: Tensor, place: Place, draw: Draw) -> None:
    """Brighter cortex (what is already brighter than the average tissue) at a place and its mirror image, in place.

    Insula, hippocampus and cingulate gyrus are brighter than other cortex in healthy people: what is symmetric is no infarct.
    """
    spread = (draw.uniform(0.06, 0.25), draw.uniform(0.06, 0.25), draw.uniform(0.05, 0.2))
    blob = paired_blob(brain, place, spread, draw) * (images[ADC] < SOLID) * (4 * (images[DWI] - 0.95)).clamp(0, 1)
    images[DWI] *= 1 + draw.uniform(0.05, 0.45) * blob
    images[ADC] *= 1 - draw.uniform(0, 0.25) * blob


def paired_blob(brain: Tensor, place: Place, spread: Place, draw: Draw) -> Tensor:
    """Two nearly equal Gaussian bumps (z, y, x), 0-1, left and right; place and spread in shares of the brain's box."""
    centre, half = box_of(brain)
    axes = [(torch.arange(n, device=brain.device) - c) / h for n, c, h in zip(brain.shape, centre, half, strict=True)]
    at = [p + draw.normal(0, 0.06) for p in place]
    wide = [s * draw.lognormal(1.0, 0.3) for s in spread]
    total = torch.zeros(brain.shape, device=brain.device)
    for side in (-1, 1):
        middle = (at[0] + draw.normal(0, 0.02), at[1] + draw.normal(0, 0.02), side * at[2] + draw.normal(0, 0.02))
        z, y, x = (torch.exp(-0.5 * ((axes[i] - middle[i]) / wide[i]) ** 2) for i in range(3))
        total = torch.maximum(total, draw.uniform(0.75, 1.0) * z[:, None, None] * y[:, None] * x)
    return total


def mirror(images: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Flip a case along any axes: files come in every orientation, and mirroring at inference needs it."""
    axes = [axis for axis in (1, 2, 3) if draw.chance(0.5)]
    return images.flip(axes), label.flip([axis - 1 for axis in axes])
