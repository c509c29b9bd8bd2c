"""Training batches from a bank of simulated patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from training.augment import mirror, rescan
from training.draw import Draw
from training.members import NEIGHBOURS, MemberSpec

TYPICAL_COMPONENT_VOXELS = 200.0  # components smaller than this weigh more a voxel, up to
LARGEST_WEIGHT = 2.0
SLICES_OF_A_CASE = 8
FLAIR_MISSING = 0.35  # share of the cases shown without FLAIR to a member that must do without it at times


class Bank:
    """A folder of cases that may grow while it is read, but not lose a case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: list[Path] = []
        self.refresh()

    def refresh(self) -> None:
        self._paths = sorted(self.folder.glob("case_*.npz"))
        if not self._paths:
            raise FileNotFoundError(
                f"{self.folder} holds no simulated case: run python -m training.simulate --out {self.folder} first"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, draw: Draw, *, at_2mm: bool) -> tuple[Tensor, Tensor, float]:
        """A random case: images (3, z, y, x), label (z, y, x), and its in-plane voxel size in mm."""
        with np.load(draw.choice(self._paths)) as case:
            suffix = "_2mm" if at_2mm and "images_2mm" in case else ""
            images = torch.from_numpy(case["images" + suffix].astype(np.float32))
            label = torch.from_numpy(case["label" + suffix].astype(np.float32))
            in_plane = 2.0 if suffix else float(case["spacing_mm"][1])
        return images, label, in_plane


def draw_batch(spec: MemberSpec, bank: Bank, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, channels, ...), labels (n, ...), and the weight of every voxel (n, ...)."""
    examples: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(examples) < spec.batch:
        images, label, in_plane = bank.load(draw, at_2mm=spec.dimensions == 3)
        images = rescan(images[: 3 if "FLAIR?" in spec.channels else 2], draw)
        if "FLAIR?" in spec.channels and draw.chance(FLAIR_MISSING):
            images[2] = 0
        images, label = mirror(images, label, draw)
        weight = component_weight(label)
        if spec.dimensions == 3:
            examples.append(_window(images, label, weight, spec.training_patch, draw))
        else:
            examples += _slices(images, label, weight, in_plane, spec, draw)
    images, labels, weights = (torch.stack(part) for part in zip(*examples[: spec.batch], strict=True))
    return images, labels, weights


def component_weight(label: Tensor) -> Tensor:
    """1 in the background, more in small components, so that a large infarct doesn't drown the emboli."""
    components, count = ndimage.label(label.numpy(), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1).clip(1)
    weights = np.sqrt(TYPICAL_COMPONENT_VOXELS / sizes).clip(1.0, LARGEST_WEIGHT)
    weights[0] = 1.0
    return torch.from_numpy(weights[components].astype(np.float32))


def _window(
    images: Tensor, label: Tensor, weight: Tensor, size: Sequence[int], draw: Draw
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window; two of three times one that holds a lesion voxel."""
    stack = torch.cat([images, label[None], weight[None]])
    target = _lesion_voxel(label, draw) if draw.chance(0.66) else None
    for axis, length in enumerate(size):
        have = stack.shape[axis + 1]
        if have > length:
            low, high = 0, have - length
            if target is not None:
                low, high = max(0, target[axis] - length + 1), min(high, target[axis])
            stack = stack.narrow(axis + 1, draw.integer(low, high + 1), length)
        else:
            stack = _pad(stack, axis + 1, length)
    return stack[:-2], stack[-2], stack[-1]


def _lesion_voxel(label: Tensor, draw: Draw) -> list[int] | None:
    voxels = torch.nonzero(label)
    return voxels[draw.integer(0, len(voxels))].tolist() if len(voxels) else None


def _pad(stack: Tensor, axis: int, length: int) -> Tensor:
    missing = length - stack.shape[axis]
    pad = [0, 0] * (stack.ndim - axis - 1) + [missing // 2, missing - missing // 2]
    return F.pad(stack, pad)


def _slices(
    images: Tensor, label: Tensor, weight: Tensor, in_plane_mm: float, spec: MemberSpec, draw: Draw
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Some slices of a case with their neighbours as channels, in the order of `NEIGHBOURS`."""
    stack = torch.cat([images, label[None], weight[None]])
    factor = in_plane_mm / spec.spacing_mm[0]
    if factor != 1.0:
        continuous = F.interpolate(stack[:-2], scale_factor=(factor, factor), mode="bicubic").clamp(0, 8)
        outline = F.interpolate(stack[-2:-1], size=continuous.shape[2:], mode="bilinear") > 0.5
        heavy = F.interpolate(stack[-1:], size=continuous.shape[2:], mode="nearest")
        stack = torch.cat([continuous, outline.float(), heavy])
    for axis, length in ((2, spec.training_patch[0]), (3, spec.training_patch[1])):
        have = stack.shape[axis]
        stack = (
            stack.narrow(axis, draw.integer(0, have - length + 1), length)
            if have > length
            else _pad(stack, axis, length)
        )
    depth = stack.shape[1]
    lesioned = torch.nonzero(stack[-2].sum((1, 2))).flatten().tolist()
    chosen = []
    for _ in range(SLICES_OF_A_CASE):
        at = draw.choice(lesioned) if lesioned and draw.chance(0.55) else draw.integer(0, depth)
        rows = [min(max(at + offset, 0), depth - 1) for offset in NEIGHBOURS]
        chosen.append((torch.cat([stack[:-2, row] for row in rows]), stack[-2, at], stack[-1, at]))
    return chosen
