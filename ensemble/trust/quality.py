"""How images and lesions look by themselves, in few numbers: noise, sharpness, slices, the brain's shape, what is around the lesions.

Measured where no reader is needed, as MRIQC does (Esteban et al., PLoS ONE 2017). What depends on a scanner's coil or on the program that
stripped the skull is omitted: references are simulated, and have neither (docs/adr/0026).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality

#: Largest voxel size over the smallest from which on the former is taken for the distance of slices.
_ANISOTROPIC = 1.2
#: Voxels of a slice from which on its level counts.
_SLICE_VOXELS = 200
#: Rim of the brain and its depth (mm); what lies below the rim; the shell about a lesion.
_RIM_MM, _DEEP_MM, _BELOW_RIM_MM, _SHELL_MM = 4.0, 12.0, (6.0, 14.0), (3.0, 9.0)
#: Parts of the rim that are compared each with what lies below it: sectors around the vertical axis, upper and lower ones. Fewest voxels.
_SECTORS, _SECTOR_VOXELS = 8, 50
#: Shape and rim are measured on voxels of about this size at least.
_SHAPE_MM = 2.0
#: Range of ADC (normal tissue: 1) of normal or ill tissue; above the second value there is CSF, which counts from so many voxels.
_TISSUE, _NOT_FLUID, _FLUID_VOXELS = (0.4, 1.6), 2.2, 100
#: b times the ADC of normal tissue, for the contrast that DWI would have without diffusion: 1000 s/mm^2, 0.75e-3 mm^2/s.
_B_ADC = 0.75


@dataclass(frozen=True)
class TraitMeaning:
    """The name of a trait (a measurement such as noise) for messages, and the direction in which unusual values are suspicious."""

    words: str
    suspicious: Literal["high", "low", "both"] = "both"

    def excess(self, spreads: float) -> float:
        """Return how suspicious a value is that is `spreads` standard deviations above the mean; 0 on the harmless side."""
        return (
            abs(spreads) if self.suspicious == "both" else max(0.0, spreads if self.suspicious == "high" else -spreads)
        )


#: Of the images.
IMAGES: Mapping[str, TraitMeaning] = {
    "noise_dwi": TraitMeaning("the noise of the DWI"),
    "noise_adc": TraitMeaning("the noise of the ADC map"),
    "sharpness": TraitMeaning("the sharpness of the DWI"),
    "slice_levels": TraitMeaning("steps in brightness from slice to slice", "high"),
    "slice_jumps": TraitMeaning("differences between neighbouring slices", "high"),
    "contrast": TraitMeaning("a DWI that is bright where the ADC is high", "high"),
    "rim_dwi": TraitMeaning("a bright rim of the brain on DWI, as of scalp", "high"),
    "rim_adc": TraitMeaning("a low ADC at the rim of the brain, as of scalp", "low"),
    "rim_part": TraitMeaning(
        "a part of the brain's rim with brighter DWI and lower ADC than below it, as of scalp", "high"
    ),
    "fluid": TraitMeaning("CSF that is not dark on DWI, as on an image of low b or of mirrored contrast", "high"),
    "surface": TraitMeaning("a ragged surface of the brain", "high"),
    "depth": TraitMeaning("the thickness of the brain"),
    "height": TraitMeaning("the height of the brain for its width"),
    "length": TraitMeaning("the length of the brain for its width"),
    "skew_height": TraitMeaning("the shape of the brain from bottom to top"),
    "skew_length": TraitMeaning("the shape of the brain from front to back"),
    "tilt": TraitMeaning("the shape of the brain seen from the side"),
}
#: Of the lesions together.
LESIONS: Mapping[str, TraitMeaning] = {
    "adc": TraitMeaning("an ADC in the lesion that is not lowered, as of T2 shine-through or an old infarct", "high"),
    "t2": TraitMeaning("brightness of the lesion that diffusion does not explain, as of T2 or an artefact", "high"),
    "around": TraitMeaning("a raised ADC around the lesion, as of a tumour's or an abscess's oedema", "high"),
}


def measure_image_quality(case: PreparedCase) -> dict[str, float]:
    """Return the image-quality measures of a case, by the names in `IMAGES`; some are left out if there is hardly a brain.

    They are measured along anatomical axes, whatever the axis order on disk. Slices are stacked along the axis with the largest voxels.
    """
    canonical = case.grid.canonical()
    spacing = canonical.spacing(case.grid.spacing_zyx_mm)
    brain = canonical.apply(case.brain.array)
    box = ndimage.find_objects(brain.astype(np.uint8))
    if not box:
        return {}
    brain = np.pad(brain[box[0]], 1)
    dwi, adc = (
        np.pad(canonical.apply(case.tissue_normalized[m].array)[box[0]].astype(np.float32), 1)
        for m in (Modality.DWI, Modality.ADC)
    )
    every = tuple(slice(None, None, max(1, int(_SHAPE_MM / mm))) for mm in spacing)
    thinned = tuple(mm * step.step for mm, step in zip(spacing, every, strict=True))
    found = _shape(brain[every], thinned) | _rim(dwi[every], adc[every], brain[every], thinned)
    across = int(np.argmax(spacing)) if max(spacing) > _ANISOTROPIC * min(spacing) else 0
    dwi, adc, brain = (np.moveaxis(array, across, 0) for array in (dwi, adc, brain))
    others = (mm for axis, mm in enumerate(spacing) if axis != across)
    found |= _texture(dwi, adc, brain, (spacing[across], *others))
    return {name: found[name] for name in IMAGES if math.isfinite(found.get(name, math.nan))}


def measure_lesion_traits(case: PreparedCase, mask: BoolArray) -> dict[str, float]:
    """Return the numbers of `LESIONS` of a mask (z, y, x) on the DWI grid; none of an empty one."""
    if not mask.any():
        return {}
    spacing = np.array(case.grid.spacing_zyx_mm)
    margin = np.ceil(_SHELL_MM[1] / spacing).astype(int) + 1
    box = tuple(
        slice(max(0, part.start - pad), part.stop + pad)
        for part, pad in zip(ndimage.find_objects(mask.astype(np.uint8))[0], margin, strict=True)
    )
    dwi, adc = (case.tissue_normalized[m].array[box] for m in (Modality.DWI, Modality.ADC))
    inside, brain = mask[box], case.brain.array[box]
    distance = ndimage.distance_transform_edt(~inside, spacing)
    shell = (distance > _SHELL_MM[0]) & (distance <= _SHELL_MM[1]) & brain & (adc < _NOT_FLUID)
    level, restriction = float(np.median(dwi[inside])), float(np.median(adc[inside]))
    found = {"adc": restriction, "t2": math.log(max(level, 0.01)) + _B_ADC * (restriction - 1)}
    return found | ({"around": float(np.median(adc[shell]))} if shell.any() else {})


def _shape(brain: BoolArray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Of a mask (z, y, x) in canonical order: proportions, lopsidedness, raggedness."""
    mm = np.array(spacing)
    points = np.argwhere(brain) * mm
    off = points - points.mean(axis=0)
    z, y, x = np.maximum(off.std(axis=0), 1e-3)
    signs = brain.astype(np.int8)
    faces = sum(np.abs(np.diff(signs, axis=k)).sum() * mm.prod() / mm[k] for k in range(3))
    return {
        "surface": float(np.log(faces**1.5 / (brain.sum() * mm.prod()))),
        "height": float(np.log(z / x)),
        "length": float(np.log(y / x)),
        "skew_height": float((off[:, 0] ** 3).mean() / z**3),
        "skew_length": float((off[:, 1] ** 3).mean() / y**3),
        "tilt": float((off[:, 0] * off[:, 1]).mean() / (z * y)),
    }


def _rim(dwi: FloatArray, adc: FloatArray, brain: BoolArray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Of arrays (z, y, x): what the rim of the brain is against its depth."""
    distance = ndimage.distance_transform_edt(brain, spacing)
    rim, deep = brain & (distance <= _RIM_MM), distance > _DEEP_MM
    found = {"depth": float(np.log(distance.max()))}
    if rim.any() and deep.any():
        for name, image in (("rim_dwi", dwi), ("rim_adc", adc)):
            found[name] = float(np.log((np.median(image[rim]) + 0.02) / (np.median(image[deep]) + 0.02)))
    found["rim_part"] = _rim_part(dwi, adc, brain, distance)
    return found


def _rim_part(dwi: FloatArray, adc: FloatArray, brain: BoolArray, distance: FloatArray) -> float:
    """Of arrays (z, y, x): how much more restricted the rim is than what lies below it, in the part where it is most; nan without any."""
    at = np.argwhere(brain)
    up, back, side = (at - at.mean(axis=0)).T
    part = 2 * np.floor((np.arctan2(back, side) / (2 * np.pi) + 0.5) * _SECTORS).clip(max=_SECTORS - 1) + (up > 0)
    depth = distance[brain]
    restriction = np.log((dwi[brain].clip(0) + 0.05) / (adc[brain].clip(0) + 0.05))
    rim, below = depth <= _RIM_MM, (depth > _BELOW_RIM_MM[0]) & (depth <= _BELOW_RIM_MM[1])
    pairs = [(restriction[rim & (part == n)], restriction[below & (part == n)]) for n in range(2 * _SECTORS)]
    excess = [
        float(np.median(outer) - np.median(inner))
        for outer, inner in pairs
        if min(len(outer), len(inner)) >= _SECTOR_VOXELS
    ]
    return max(excess, default=math.nan)


def _texture(dwi: FloatArray, adc: FloatArray, brain: BoolArray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Of arrays (slice, row, column): noise and sharpness within slices, differences across them, contrast."""
    found: dict[str, float] = {}
    core = ndimage.binary_erosion(brain, np.ones((1, 3, 3)))
    for name, image in (("noise_dwi", dwi), ("noise_adc", adc)):
        around = image[:, :-2, 1:-1] + image[:, 2:, 1:-1] + image[:, 1:-1, :-2] + image[:, 1:-1, 2:]
        residual = (image[:, 1:-1, 1:-1] - around / 4)[core[:, 1:-1, 1:-1]]
        if residual.size:  # the residual of white noise is sqrt(1 + 1/4) times as large
            found[name] = float(np.log(1.4826 * np.median(np.abs(residual)) / 1.118 + 1e-4))
    pairs = core[:, :, 2:] & core[:, :, :-2]
    if pairs.any():
        near = np.abs(np.diff(dwi, axis=2))[:, :, 1:][pairs].mean()
        found["sharpness"] = float(np.abs(dwi[:, :, 2:] - dwi[:, :, :-2])[pairs].mean() / max(near, 1e-6))
    across, along = core[1:] & core[:-1], core[:, 1:] & core[:, :-1]
    if across.any() and along.any():
        jumps, steps = (
            np.abs(np.diff(dwi, axis=axis))[where].mean() / spacing[axis] ** 0.5
            for axis, where in ((0, across), (1, along))
        )
        found["slice_jumps"] = float(np.log((jumps + 1e-3) / (steps + 1e-3)))
    levels = np.log([max(np.median(s[b]), 1e-3) for s, b in zip(dwi, brain, strict=True) if b.sum() > _SLICE_VOXELS])
    if len(levels) > 2:
        bent = np.abs(levels[1:-1] - (levels[2:] + levels[:-2]) / 2)
        found["slice_levels"] = float(np.log(bent.mean() + 1e-3))
    tissue = brain & (adc > _TISSUE[0]) & (adc < _TISSUE[1])
    if tissue.sum() > _SLICE_VOXELS:
        found["contrast"] = _correlation(np.clip(dwi[tissue], 0, 3), adc[tissue])
    fluid = brain & (adc > _NOT_FLUID)
    if fluid.sum() > _FLUID_VOXELS:
        found["fluid"] = float(np.log(np.median(dwi[fluid]).clip(0) + 0.05))
    return found


def _correlation(one: AnyArray, other: AnyArray) -> float:
    if min(one.std(), other.std()) < 1e-6:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])
