"""What makes a mask wrong: images that are no good DWI, in twelve kinds and three strengths each.

They work on what a scanner delivers, skull-stripped and on one grid (`training.evaluate.as_raw`); some the product's checks refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ensemble.readers.base import RawCase
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality
from training.draw import Draw

STRENGTHS = (0, 1, 2)
Images = dict[Modality, FloatArray]
Corruption = Callable[[Images, BoolArray, tuple[float, float, float], int, Draw], Images]


def corrupted(raw: RawCase, kind: str, strength: int, seed: int) -> RawCase:
    """A simulated case, spoilt: `kind` is a row of `CORRUPTIONS`, `strength` one of `STRENGTHS`."""
    images = {modality: image.volume.array.astype(np.float32) for modality, image in raw.images.items()}
    spacing = raw.images[Modality.DWI].volume.grid.spacing_zyx_mm
    spoilt = CORRUPTIONS[kind](dict(images), images[Modality.DWI] > 0, spacing, strength, Draw(seed))
    return replace(
        raw,
        images={
            modality: replace(image, volume=image.volume.like(np.ascontiguousarray(spoilt[modality], np.float32)))
            for modality, image in raw.images.items()
        },
    )


def _level(image: FloatArray, brain: BoolArray) -> float:
    return float(np.median(image[brain]))


def _weighting(images: Images, b: float) -> Images:
    """DWI of another b (in 1000 s/mm^2), where it had b = 1: S = S0 exp(-b ADC)."""
    return images | {Modality.DWI: images[Modality.DWI] * np.exp((1 - b) * images[Modality.ADC])}


def unweighted(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """A DWI of low b; at last the b0 (T2) image."""
    return _weighting(images, (0.4, 0.2, 0.0)[strength])


def high_b(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """A DWI of b = 2000, 3000, 5000 s/mm^2, in the noise of b = 1000."""
    made = _weighting(images, (2.0, 3.0, 5.0)[strength])
    sigma = 0.04 * _level(images[Modality.DWI], brain)
    return made | {Modality.DWI: _rician(made[Modality.DWI], sigma, draw) * brain}


def noise(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """Rician noise of a tenth, a quarter, half of tissue's signal in the DWI, and what it does to the ADC map."""
    share = (0.1, 0.25, 0.5)[strength]
    dwi = _rician(images[Modality.DWI], share * _level(images[Modality.DWI], brain), draw) * brain
    adc = np.abs(images[Modality.ADC] + 0.8 * share * draw.randn(dwi.shape).numpy()) * brain
    return images | {Modality.DWI: dwi, Modality.ADC: adc}


def motion(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """Each slice shifted in its plane by some 2, 4, 8 mm and its signal disturbed."""
    mm, gain = ((2.0, 0.1), (4.0, 0.25), (8.0, 0.4))[strength]
    made = {modality: image.copy() for modality, image in images.items()}
    for z in range(len(brain)):
        shift = [round(draw.normal(0, mm) / spacing[axis]) for axis in (1, 2)]
        for modality in (Modality.DWI, Modality.ADC):
            made[modality][z] = np.roll(images[modality][z], shift, (0, 1))
        made[Modality.DWI][z] *= max(0.05, 1 - abs(draw.normal(0, gain)))
    return made


def ghosting(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """A Nyquist ghost of a tenth, a quarter, half of the signal."""
    share = (0.1, 0.25, 0.5)[strength]
    dwi, half = images[Modality.DWI], images[Modality.DWI].shape[1] // 2
    return images | {Modality.DWI: dwi + share * np.roll(dwi, half, 1)}


def bias(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """A smooth coil shading of the DWI."""
    smooth = draw.field([max(8, round(n * mm)) for n, mm in zip(brain.shape, spacing, strict=True)], 60.0)
    gain = F.interpolate(smooth[None], size=brain.shape, mode="trilinear")[0, 0].numpy()
    return images | {Modality.DWI: images[Modality.DWI] * np.exp((0.3, 0.6, 1.0)[strength] * gain)}


def missing_slices(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """A tenth, a quarter, half of the slices are empty in all images."""
    lost = draw.randn((len(brain),)).numpy().argsort()[: round((0.1, 0.25, 0.5)[strength] * len(brain))]
    made = {modality: image.copy() for modality, image in images.items()}
    for image in made.values():
        image[lost] = 0
    return made


def partial_skull(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """Bright scalp left on a quarter, a half, all of the circumference; as far as the field of view has room."""
    distance = ndimage.distance_transform_edt(~brain, spacing)
    sector = sector_of(brain.shape, draw.uniform(-np.pi, np.pi), (0.25, 0.5, 1.0)[strength])
    rim = (distance > 1) & (distance < 6) & sector
    made = {modality: image.copy() for modality, image in images.items()}
    texture = 1 + 0.2 * draw.randn((int(rim.sum()),)).numpy()
    made[Modality.DWI][rim] = 1.6 * _level(images[Modality.DWI], brain) * texture
    made[Modality.ADC][rim] = 0.4 * texture
    return made


def sector_of(shape_zyx: Sequence[int], angle: float, share: float) -> BoolArray:
    """A sector (y, x) of each slice about its middle: its direction (radians) and its share of the circumference."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx[1:]), indexing="ij")
    apart = np.abs((np.arctan2(y, x) - angle + np.pi) % (2 * np.pi) - np.pi)
    return np.asarray(apart <= np.pi * share, dtype=bool)


def adc_unit(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """An ADC map in another unit, which is no fault; then with half or twice tissue's ADC added, as where an intercept was lost."""
    add = (0.0, 0.4, 1.5)[strength]
    return images | {Modality.ADC: 1000 * (images[Modality.ADC] + add) * brain}


def flipped_contrast(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """The DWI's values mirrored, by half, three quarters, wholly."""
    dwi, share = images[Modality.DWI], (0.5, 0.75, 1.0)[strength]
    top = float(np.percentile(dwi[brain], 99.5))
    return images | {Modality.DWI: np.clip((1 - share) * dwi + share * (top - dwi), 0, None) * brain}


def low_resolution(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """Voxels of 4, 7, 12 mm."""
    mm = (4.0, 7.0, 12.0)[strength]
    size = [max(4, round(n * s / mm)) for n, s in zip(brain.shape, spacing, strict=True)]
    made = {}
    for modality, image in images.items():
        small = F.interpolate(torch.from_numpy(image)[None, None], size=size, mode="area")
        made[modality] = F.interpolate(small, size=image.shape, mode="trilinear")[0, 0].numpy() * brain
    return made


def other_anatomy(images: Images, brain: BoolArray, spacing: tuple[float, ...], strength: int, draw: Draw) -> Images:
    """No head as it is expected: its lower half alone; axes exchanged; pieces in the wrong places."""
    if strength == 0:
        return {
            m: np.where(np.arange(len(image))[:, None, None] < 0.5 * len(image), image, 0)
            for m, image in images.items()
        }
    if strength == 1:
        return {m: _fitted(image.transpose(1, 0, 2)[:, ::-1], brain.shape) for m, image in images.items()}
    pieces = [4, 4, 4]
    order = draw.randn((64,)).numpy().argsort()
    return {m: _shuffled(image, pieces, order) for m, image in images.items()}


def _fitted(image: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    made = F.interpolate(torch.from_numpy(image.copy())[None, None], size=shape, mode="trilinear")[0, 0]
    return np.asarray(made.numpy())


def _shuffled(image: FloatArray, pieces: list[int], order: AnyArray) -> FloatArray:
    step = [n // p for n, p in zip(image.shape, pieces, strict=True)]
    boxes = [
        tuple(slice(at * s, (at + 1) * s) for at, s in zip(np.unravel_index(k, pieces), step, strict=True))
        for k in range(len(order))
    ]
    made = np.zeros_like(image)
    for target, source in zip(boxes, order, strict=True):
        made[target] = image[boxes[int(source)]]
    return made


def _rician(image: FloatArray, sigma: float, draw: Draw) -> FloatArray:
    real, imaginary = (sigma * draw.randn(image.shape).numpy() for _ in range(2))
    return np.hypot(image + real, imaginary)


#: The kinds, by name.
CORRUPTIONS: Mapping[str, Corruption] = {
    "unweighted": unweighted,
    "high_b": high_b,
    "noise": noise,
    "motion": motion,
    "ghosting": ghosting,
    "bias": bias,
    "missing_slices": missing_slices,
    "partial_skull": partial_skull,
    "adc_unit": adc_unit,
    "flipped_contrast": flipped_contrast,
    "low_resolution": low_resolution,
    "other_anatomy": other_anatomy,
}
#: Kinds that the calibration of the trust score uses; the others are first seen in its test.
CALIBRATION_KINDS = ("unweighted", "noise", "motion", "bias", "low_resolution")
