"""Label maps of whole heads, and random people made from them."""

from __future__ import annotations

import io
import lzma
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.draw import Draw
from training.tissues import FREESURFER, Tissue

LABEL_MAPS = "anatomy/synthseg_label_maps.npz.xz"
MARGIN_MM = 6
EXTRACEREBRAL = 500  # label numbers from here on are no brain
HEADS = 20
HELD_OUT_HEADS = (4, 9, 14, 19)  # kept for validation
TRAINING_HEADS = tuple(n for n in range(HEADS) if n not in HELD_OUT_HEADS)


@dataclass(frozen=True)
class Anatomy:
    """One head on a 1 mm grid (z: to superior, y: to anterior, x: to the patient's left), cropped to the brain."""

    classes: Tensor  # uint8 (z, y, x), values of `Tissue`
    tract: Tensor  # float32 (z, y, x), 0-1: internal capsule, corticospinal tract, splenium


def material(shared: Path, name: str) -> Path:
    """The path of one of the simulator's materials; they lie outside the repository."""
    path = shared / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: training needs the label maps and lesion masks; give their folder with --shared"
        )
    return path


@cache
def load_head(shared: Path, index: int) -> Anatomy:
    """One of the `HEADS` label maps, converted to tissue classes."""
    archive = _label_maps(shared)
    return _head(archive[f"labels_{index + 1:02d}"], archive[f"lut_{index + 1:02d}"])


@cache
def _label_maps(shared: Path) -> dict[str, np.ndarray]:
    packed = lzma.decompress(material(shared, LABEL_MAPS).read_bytes())
    with np.load(io.BytesIO(packed)) as archive:
        return dict(archive)


def _head(labels: np.ndarray, lut: np.ndarray) -> Anatomy:
    classes, _ = _cropped(labels, lut)
    return Anatomy(classes, tract_map(classes))


def freesurfer_numbers(shared: Path, index: int) -> Tensor:
    """The label map of a head with FreeSurfer's own numbers, int32 (z, y, x), on the grid of `load_head`; 0 beyond the brain."""
    archive = _label_maps(shared)
    return _cropped(archive[f"labels_{index + 1:02d}"], archive[f"lut_{index + 1:02d}"])[1]


def _cropped(labels: np.ndarray, lut: np.ndarray) -> tuple[Tensor, Tensor]:
    """From the archive's (x, y, z) RAS indices to our (z, y, x), x to the left: tissue classes, and FreeSurfer's numbers."""
    to_class = np.zeros(int(lut.max()) + 1, dtype=np.uint8)
    for tissue, members in FREESURFER.items():
        for number in members:
            if number < len(to_class):
                to_class[number] = tissue
    turned = lut[labels].transpose(2, 1, 0)[:, :, ::-1]
    classes = torch.from_numpy(to_class[turned].copy())
    numbers = torch.from_numpy(np.where(turned < EXTRACEREBRAL, turned, 0).astype(np.int32))
    box = bounding_box((classes > 0) & (classes != Tissue.CSF), MARGIN_MM)
    return classes[box].contiguous(), numbers[box].contiguous()


def tract_map(classes: Tensor) -> Tensor:
    """Where the internal capsule, the corticospinal tract and the splenium run (0-1), found from their neighbours' labels.

    These are brighter on DWI and lower in ADC than other white matter, on both sides alike: a network must learn to leave them alone.
    """
    small = classes[::2, ::2, ::2]  # 2 mm is fine enough for something this smooth
    white = small == Tissue.WHITE
    medial = blur(((small == Tissue.THALAMUS) | (small == Tissue.CAUDATE)).float(), 1.5)
    lateral = blur(((small == Tissue.PUTAMEN) | (small == Tissue.PALLIDUM)).float(), 1.5)
    capsule = (14 * medial * lateral).clamp(0, 1) * white
    stem = white | (small == Tissue.BRAINSTEM) | (small == Tissue.VENTRAL_DIENCEPHALON)
    tract = torch.maximum(_follow(capsule, white.float(), up=True), _follow(capsule, stem.float(), up=False))
    fine = F.interpolate(tract[None, None], size=tuple(classes.shape), mode="trilinear", align_corners=False)[0, 0]
    return torch.maximum(fine, _splenium(classes)).clamp(0, 1)


def _follow(capsule: Tensor, through: Tensor, *, up: bool) -> Tensor:
    """Follow the fibres from the capsule: up and fanning outwards, or down and converging; 2 mm a step, x's middle between the sides."""
    half = capsule.shape[2] // 2
    tract = fibres = capsule
    for step in range(1, 21):
        moved = torch.roll(fibres, 1 if up else -1, 0)
        sideways = (step % 2) * (1 if up else -1)
        moved = torch.cat(
            [torch.roll(moved[..., :half], -sideways, 2), torch.roll(moved[..., half:], sideways, 2)], dim=2
        )
        fibres = 0.97 * blur(moved, 0.6) * through
        tract = torch.maximum(tract, fibres)
    return tract


def _splenium(classes: Tensor) -> Tensor:
    """White matter across the midline above the ventricles' level: its rear end."""
    middle = classes.shape[2] // 2
    corridor = torch.zeros(classes.shape)
    corridor[:, :, middle - 9 : middle + 9] = 1
    callosum = corridor * (classes == Tissue.WHITE)
    midline = callosum[:, :, middle - 2 : middle + 2].sum(2) >= 3
    if not midline.any():
        return torch.zeros(classes.shape)
    rows = torch.nonzero(midline.any(0)).flatten()
    rear, front = int(rows[0]), int(rows[-1])
    callosum[:, rear + int(0.35 * (front - rear)) :] = 0
    return blur(callosum * midline[:, :, None], 1.5).clamp(0, 1)


def blur(image: Tensor, sigma_voxels: float) -> Tensor:
    """Gaussian blur of a tensor (z, y, x), separable, edges replicated; as matrix products, which beats one-channel convolutions.

    Wide blurs are done on half the grid.
    """
    if sigma_voxels >= 1.4 and min(image.shape) >= 8:
        half = F.avg_pool3d(image[None, None].float(), 2, ceil_mode=True)
        return F.interpolate(
            _blur(half[0, 0], sigma_voxels / 2)[None, None], size=tuple(image.shape), mode="trilinear"
        )[0, 0]
    return _blur(image.float(), sigma_voxels)


def _blur(image: Tensor, sigma_voxels: float) -> Tensor:
    result = image
    for axis in range(3):
        kernel = _blur_matrix(image.shape[axis], sigma_voxels, image.device)
        result = torch.movedim(torch.movedim(result, axis, -1) @ kernel, -1, axis)
    return result.contiguous()


@lru_cache(maxsize=256)
def _blur_matrix(length: int, sigma: float, device: torch.device) -> Tensor:
    """(length, length): column i holds the weights of voxel i's neighbours; what would fall outside counts for the border voxel."""
    radius = math.ceil(3 * sigma)
    at = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    columns = torch.arange(length)[None, :].expand(len(at), -1)
    rows = (columns + at[:, None]).clamp(0, length - 1)
    matrix = torch.zeros(length, length)
    matrix.index_put_(
        (rows.flatten(), columns.flatten()), weights[:, None].expand(-1, length).flatten(), accumulate=True
    )
    return matrix.to(device)


@dataclass(frozen=True)
class Person:
    """A randomly deformed head, posed as in the scanner, on a 1 mm grid."""

    classes: Tensor  # int64 (z, y, x)
    tract: Tensor  # (z, y, x)
    source: Tensor  # (z, y, x, 3): the place in the head's label map, in voxels (z, y, x)
    head_shape: tuple[int, int, int]


def random_person(head: Anatomy, draw: Draw) -> Person:
    """Pose, stretch, bend and age a head: 20 label maps have to stand for everybody."""
    size = head.classes.shape
    coordinates = _deformed_grid(size, draw)
    grid = to_grid_sample(coordinates, size)
    classes = (
        F.grid_sample(head.classes[None, None].float(), grid, mode="nearest", align_corners=True)[0, 0].round().long()
    )
    tract = F.grid_sample(head.tract[None, None], grid, mode="bilinear", align_corners=True)[0, 0]
    box = bounding_box((classes > 0) & (classes != Tissue.CSF), MARGIN_MM)
    return Person(age_sulci(classes[box], draw), tract[box], coordinates[box], (size[0], size[1], size[2]))


def bounding_box(mask: Tensor, margin: int) -> tuple[slice, ...]:
    """The slices (z, y, x) that hold the mask and `margin` voxels around it; everything if the mask is empty."""
    box = []
    for axis, length in enumerate(mask.shape):
        where = torch.nonzero(mask.movedim(axis, 0).flatten(1).any(dim=1)).flatten()
        first, last = (int(where[0]), int(where[-1])) if len(where) else (0, length - 1)
        box.append(slice(max(0, first - margin), min(length, last + 1 + margin)))
    return tuple(box)


def to_grid_sample(coordinates: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Voxel coordinates (z, y, x) of a volume of `shape` to what `grid_sample(align_corners=True)` takes: (1, z, y, x, xyz) in -1..1."""
    scale = torch.tensor([2.0 / (n - 1) for n in shape], device=coordinates.device)
    return (coordinates * scale - 1).flip(-1)[None]


def _deformed_grid(size: torch.Size, draw: Draw) -> Tensor:
    angles = [draw.normal(0, 0.05), draw.normal(0, 0.05), draw.normal(0, 0.12)]  # about z, y, x (the last is nodding)
    margin = 8
    shape = [n + 2 * margin for n in size]
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    matrix = torch.eye(3)
    for (i, j), angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
        turn = torch.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    stretch = torch.tensor([draw.lognormal(1.0, 0.05) for _ in range(3)])
    shear = torch.eye(3) + 0.03 * torch.tensor(
        [[0.0, draw.normal(), draw.normal()], [draw.normal(), 0, draw.normal()], [draw.normal(), draw.normal(), 0]]
    )
    coordinates = points @ (matrix @ torch.diag(stretch) @ shear).T
    bend = draw.uniform(0.4, 1.0)
    for cell_mm, std_mm in ((55.0, 3.5), (22.0, 2.0), (10.0, 0.7)):
        coordinates += bend * std_mm * draw.field(shape, cell_mm, 3).permute(1, 2, 3, 0).cpu()
    centre = torch.tensor([(n - 1) / 2 for n in size])
    return (coordinates + centre).to(draw.device)


def age_sulci(classes: Tensor, draw: Draw) -> Tensor:
    """Widen or close the sulci: CSF grows where its blurred share exceeds a threshold that varies over the head."""
    csf = (classes == Tissue.CSF).float()
    share = blur(csf, 1.2)
    threshold = draw.uniform(0.3, 0.6) + 0.05 * draw.field(classes.shape, 40.0)[0]
    cortical = (classes == Tissue.CORTEX) | (classes == Tissue.WHITE)
    aged = torch.where(cortical & (share > threshold), int(Tissue.CSF), classes)
    closes = (csf > 0) & (share < threshold - 0.12) & (blur((classes == Tissue.CORTEX).float(), 1.2) > 0.3)
    aged = torch.where(closes, int(Tissue.CORTEX), aged)
    ventricle = blur((classes == Tissue.VENTRICLE).float(), 1.5)
    wide = draw.uniform(0.2, 0.6)
    return torch.where((aged == Tissue.WHITE) & (ventricle > wide), int(Tissue.VENTRICLE), aged)


def brain_hull(classes: Tensor, draw: Draw) -> Tensor:
    """The mask (0/1 float) of a skull-stripping tool: brain and the CSF of its sulci, its rim a little random."""
    solid = ((classes > 0) & (classes != Tissue.CSF)).float()
    threshold = draw.uniform(0.28, 0.5) + 0.04 * draw.field(classes.shape, 25.0)[0]
    hull = (blur(solid, draw.uniform(2.5, 5.0)) > threshold) | (blur(solid, 7.0) > 0.62)
    return (hull & (classes > 0)).float()
