"""The sample case as people might hand it over: reoriented, resampled, in other units and formats, or broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from conftest import SAMPLE, StubMember
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, Modality, ProgressCallback

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
SLUGS = {modality: f"{modality}-brain-mri" for modality in Modality}
PIXELS = {
    "uint8": sitk.sitkUInt8,
    "int16": sitk.sitkInt16,
    "uint16": sitk.sitkUInt16,
    "int32": sitk.sitkInt32,
    "uint32": sitk.sitkUInt32,
    "int64": sitk.sitkInt64,
    "float32": sitk.sitkFloat32,
    "float64": sitk.sitkFloat64,
}


@dataclass(frozen=True)
class Case:
    """Images on their way to files."""

    images: dict[Modality, sitk.Image]
    suffix: str = ".mha"
    name: str = "scan"
    after: tuple[Callable[[dict[Modality, Path]], object], ...] = field(default=())
    """What is done to the files once they are written."""

    def change(self, how: Callable[[sitk.Image], sitk.Image], *modalities: Modality) -> Case:
        """Change some images (by default DWI and ADC)."""
        changed = {m: how(self.images[m]) for m in modalities or (DWI, ADC)}
        return replace(self, images=self.images | changed)

    def then(self, how: Callable[[dict[Modality, Path]], object]) -> Case:
        return replace(self, after=(*self.after, how))

    def write(self, root: Path) -> Path:
        """The contract's input folder."""
        files = {}
        for modality, image in self.images.items():
            folder = root / "images" / SLUGS[modality]
            folder.mkdir(parents=True)
            files[modality] = folder / f"{self.name}{self.suffix}"
            sitk.WriteImage(image, str(files[modality]), False)
        for how in self.after:
            how(files)
        return root


def sample(*, flair: bool = False) -> Case:
    """The sample case as it is."""
    wanted = Modality if flair else (DWI, ADC)
    folder = SAMPLE / "input" / "images"
    return Case({m: sitk.ReadImage(str(next((folder / SLUGS[m]).glob("*.mha"))), sitk.sitkFloat32) for m in wanted})


class Rule(StubMember):
    """A member whose every voxel depends on DWI and ADC there, in tissue-normalised intensities, and on nothing else."""

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        dwi, adc = case.tissue_normalized[DWI], case.tissue_normalized[ADC]
        damage = np.minimum(dwi.array - 1.35, 0.85 - adc.array)
        return MemberPrediction(self.name, dwi.like(np.clip(damage + 0.5, 0, 1).astype(np.float32)), networks=1)


def values(how: Callable[[AnyArray], AnyArray]) -> Callable[[sitk.Image], sitk.Image]:
    """A change of the array (z, y, x) that keeps the grid."""

    def change(image: sitk.Image) -> sitk.Image:
        changed = sitk.GetImageFromArray(how(sitk.GetArrayFromImage(image)))
        changed.CopyInformation(image)
        return changed

    return change


def cast(pixel: str) -> Callable[[sitk.Image], sitk.Image]:
    return lambda image: sitk.Cast(sitk.Round(image) if "int" in pixel else image, PIXELS[pixel])


def flipped(*axes: int) -> Callable[[sitk.Image], sitk.Image]:
    """The same voxels in the same places, stored the other way round along index axes."""
    return lambda image: sitk.Flip(image, [axis in axes for axis in range(3)], False)


def permuted(*order: int) -> Callable[[sitk.Image], sitk.Image]:
    return lambda image: sitk.PermuteAxes(image, list(order))


def turned(degrees: float, shift_mm: Sequence[float] = (0, 0, 0)) -> Callable[[sitk.Image], sitk.Image]:
    """Another place in the world: the header turned about an odd axis and moved."""

    def change(image: sitk.Image) -> sitk.Image:
        motion = sitk.Euler3DTransform()
        motion.SetRotation(*(np.deg2rad(degrees) * np.array([0.6, -0.5, 0.62])))
        motion.SetTranslation([float(mm) for mm in shift_mm])
        moved = sitk.Image(image)
        matrix = np.reshape(motion.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))
        moved.SetDirection(matrix.ravel().tolist())
        moved.SetOrigin(motion.TransformPoint(image.GetOrigin()))
        return moved

    return change


def regridded(
    spacing_mm: Sequence[float], degrees: float = 0, shift_mm: float = 0
) -> Callable[[sitk.Image], sitk.Image]:
    """The same place in the world, sampled on another grid (linear)."""

    def change(image: sitk.Image) -> sitk.Image:
        size = [
            round(n * old / new) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing_mm, strict=True)
        ]
        grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
        grid.SetSpacing([float(mm) for mm in spacing_mm])
        turn = np.deg2rad(degrees)
        about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        direction = np.reshape(image.GetDirection(), (3, 3)) @ about_z
        grid.SetDirection(direction.ravel().tolist())
        centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
        half = np.array([(n - 1) / 2 * mm for n, mm in zip(size, spacing_mm, strict=True)])
        grid.SetOrigin((centre - direction @ half + direction[:, 0] * shift_mm).tolist())
        return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)

    return change


def cropped(*margins: int) -> Callable[[sitk.Image], sitk.Image]:
    """Without so many voxels at the lower end of x, y, z and at the upper ends."""
    return lambda image: sitk.Crop(image, list(margins[:3]), list(margins[3:]))


def padded(*margins: int) -> Callable[[sitk.Image], sitk.Image]:
    return lambda image: sitk.ConstantPad(image, list(margins[:3]), list(margins[3:]), 0.0)


def outside(how: Callable[[AnyArray], AnyArray]) -> Callable[[sitk.Image], sitk.Image]:
    """Change what is 0 (the background): `how` gets an array of standard normal numbers."""

    def change(array: AnyArray) -> AnyArray:
        noise = np.random.default_rng(3).standard_normal(array.shape)
        return np.where(array == 0, how(noise), array).astype(np.float64)

    return values(change)


def stack(*scales: float) -> Callable[[sitk.Image], sitk.Image]:
    """A 4-D image of one volume a scale."""
    return lambda image: sitk.JoinSeries([sitk.Cast(image * scale, sitk.sitkFloat32) for scale in scales])
