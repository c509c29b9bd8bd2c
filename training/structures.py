"""The atlas of the findings, from label maps: `python -m training.structures --template T1.nii.gz`.

Each head is given a DWI of its tissues' usual signals and brought to the template by the product's own registration, so that the
probabilities hold the spread that an affine map leaves. Every head counts twice, once mirrored: the atlas is symmetric, as the template
is. Writes the template (2 mm, uint8) and the left half's structures into `ensemble/findings/data`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from ensemble.findings.registration import register_to_template
from ensemble.findings.template import DATA, FULL_GRID, GRID, STRUCTURES_FILE, T1_FILE, AtlasStructure, Template
from ensemble.geometry import Grid
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, FloatArray
from ensemble.volume import Volume, to_sitk
from training.anatomy import HEADS, blur, brain_hull, freesurfer_numbers, load_head
from training.bank import anterior_grid
from training.draw import Draw
from training.simulate import SHARED
from training.tissues import CSF_CLASSES, Tissue

#: FreeSurfer numbers, left and right; brain stem and CSF have no side of their own.
SIDED: dict[AtlasStructure, tuple[tuple[int, ...], tuple[int, ...]]] = {
    AtlasStructure.CORTEX: ((3, 17, 18), (42, 53, 54)),
    AtlasStructure.WHITE_MATTER: ((2, 25), (41, 57)),
    AtlasStructure.DEEP_GREY: ((10, 11, 12, 13, 26, 28), (49, 50, 51, 52, 58, 60)),
    AtlasStructure.CEREBELLUM: ((7, 8), (46, 47)),
}
UNSIDED: dict[AtlasStructure, tuple[int, ...]] = {
    AtlasStructure.WHITE_MATTER: (77, 78, 79, 85, 251, 252, 253, 254, 255),
    AtlasStructure.BRAIN_STEM: (16,),
    AtlasStructure.CSF: (4, 43, 5, 44, 14, 15, 24, 30, 31, 62, 63, 72, 136, 137, 163, 164),
}
#: Where a simulated person's tissue is not that of the label map any more (sulci widened or closed).
OF_TISSUE = {
    Tissue.WHITE: AtlasStructure.WHITE_MATTER,
    Tissue.CORTEX: AtlasStructure.CORTEX,
    Tissue.HIPPOCAMPUS: AtlasStructure.CORTEX,
    Tissue.CEREBELLAR_WHITE: AtlasStructure.CEREBELLUM,
    Tissue.CEREBELLAR_CORTEX: AtlasStructure.CEREBELLUM,
    Tissue.BRAINSTEM: AtlasStructure.BRAIN_STEM,
    Tissue.CSF: AtlasStructure.CSF,
    Tissue.VENTRICLE: AtlasStructure.CSF,
    Tissue.CHOROID_PLEXUS: AtlasStructure.CSF,
}
NONE = 255
SPREAD_VOXELS = 0.7  # blur of each head's structures, in voxels of 2 mm
#: DWI of CSF against tissue (1).
CSF_SIGNAL = 0.35


@cache
def structures(shared: Path, index: int) -> tuple[Tensor, Tensor]:
    """A head's structures (uint8 of `AtlasStructure`, `NONE` outside) and whether the left side is nearer (bool), (z, y, x) at 1 mm."""
    numbers = freesurfer_numbers(shared, index)
    found = torch.full(numbers.shape, NONE, dtype=torch.uint8)
    side = torch.zeros(numbers.shape, dtype=torch.int8)
    for structure, sides in SIDED.items():
        for sign, labels in zip((1, -1), sides, strict=True):
            where = torch.isin(numbers, torch.tensor(labels, dtype=torch.int32))
            found[where], side[where] = structure, sign
    for structure, labels in UNSIDED.items():
        found[torch.isin(numbers, torch.tensor(labels, dtype=torch.int32))] = structure
    return found, (side > 0) | ((side == 0) & beyond_midplane(side))


def beyond_midplane(side: Tensor) -> Tensor:
    """On which side of the plane that parts left (1) from right (-1) best each voxel lies: True for left."""
    at = torch.nonzero(side)[::50].double()
    design = torch.cat([at, torch.ones(len(at), 1, dtype=torch.double)], dim=1)
    weights = torch.linalg.lstsq(design, side[tuple(at.long().T)].double()[:, None]).solution[:, 0].float()
    z, y, x = (torch.arange(n, dtype=torch.float32) for n in side.shape)
    plane = weights[0] * z[:, None, None] + weights[1] * y[:, None] + weights[2] * x + weights[3]
    return plane > 0


def usual_images(classes: Tensor, draw: Draw) -> tuple[FloatArray, FloatArray, AnyArray]:
    """DWI and ADC (normal tissue: 1) without noise, and the brain, of a label map (z, y, x) at 1 mm."""
    csf = torch.zeros(classes.shape, dtype=torch.bool)
    for tissue in CSF_CLASSES:
        csf |= classes == tissue
    brain = (brain_hull(classes.long(), draw) > 0).numpy()
    soft = blur(csf.float(), 0.8).numpy()
    return (1 - (1 - CSF_SIGNAL) * soft) * brain, (1 + 3 * soft) * brain, brain


def head_in_template(shared: Path, index: int, onto: Template) -> FloatArray:
    """Left half's structures of one head on the template's grid (structure, z, y, x): it and its mirror image, averaged."""
    head = load_head(shared, index)
    grid = anterior_grid(head.classes.shape, (1.0, 1.0, 1.0))
    dwi, adc, brain = usual_images(head.classes, Draw(index))
    found = register_to_template(Volume(dwi, grid), Volume(adc, grid), brain, onto)
    if found is None or found.problems():
        raise RuntimeError(f"head {index} can't be brought to the template: {found}")
    back = found.transform().GetInverse()
    kinds, left = structures(shared, index)
    halves = [
        np.stack([_carried((kinds == kind) & side, grid, back) for kind in AtlasStructure]) for side in (left, ~left)
    ]
    return (halves[0] + halves[1][..., ::-1]) / 2


def _carried(where: Tensor, grid: Grid, back: sitk.Transform) -> FloatArray:
    soft = Volume(blur(where.float(), 2 * SPREAD_VOXELS).numpy(), grid)
    moved: FloatArray = resample_volume(soft, GRID, transform=back).array
    return moved


def atlas(shared: Path, heads: Sequence[int], onto: Template) -> FloatArray:
    """Probability of each structure on the left (structure, z, y, x), uint8 of 255."""
    mean = sum(head_in_template(shared, index, onto) for index in heads) / len(heads)
    return np.asarray(np.clip(np.round(255 * mean), 0, 255), np.uint8)


def small_template(path: Path) -> Volume:
    """The published T1 (1 mm, without skull) on our grid: uint8, averaged over about 2 mm, 0 outside the brain."""
    full = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    if full.GetSize() != FULL_GRID.size or not np.allclose(full.GetOrigin(), FULL_GRID.origin_mm):
        raise ValueError(f"{path} is not the ICBM 2009a symmetric template of 197 x 233 x 189 voxels")
    smooth = sitk.DiscreteGaussian(sitk.Cast(full, sitk.sitkFloat32), [0.7] * 3)
    values = resample_volume(_volume(smooth), GRID).array
    inside = resample_volume(_volume(sitk.Cast(full > 0, sitk.sitkFloat32)), GRID).array > 0.5
    values = (values + values[..., ::-1]) / 2
    inside |= inside[..., ::-1]
    return Volume(np.where(inside, np.clip(np.round(values), 1, 255), 0).astype(np.uint8), GRID)


def _volume(image: sitk.Image) -> Volume:
    return Volume(sitk.GetArrayFromImage(image), FULL_GRID)


def write(folder: Path, t1: Volume, left: AnyArray) -> None:
    """The two files of the template."""
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(to_sitk(t1), str(folder / T1_FILE), useCompression=True)
    volumes = [to_sitk(t1.like(part)) for part in left]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(folder / STRUCTURES_FILE), useCompression=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.structures", description="Template and atlas of the findings."
    )
    parser.add_argument(
        "--template",
        type=Path,
        required=True,
        help="mni_icbm152_t1_tal_nlin_sym_09a, 1 mm, as nilearn's package holds it",
    )
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DATA, help="default: %(default)s")
    options = parser.parse_args(arguments)
    t1 = small_template(options.template)
    onto = Template(t1.like(t1.array.astype(np.float32)), np.zeros((len(AtlasStructure), 1, 1, 1), np.float32))
    write(options.out, t1, atlas(options.shared, range(HEADS), onto))


if __name__ == "__main__":
    main()
