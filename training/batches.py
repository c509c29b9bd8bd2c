"""Training batches from a bank of simulated patients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensemble.types import AnyArray
from training.augment import mirror, rescan
from training.draw import Draw
from training.insertion import with_lesions
from training.lesions import LesionLibrary, load_lesions
from training.members import NEIGHBOURS, MemberSpec

TYPICAL_COMPONENT_VOXELS = 200.0  # components smaller than this weigh more a voxel, up to
LARGEST_WEIGHT = 2.0
LESIONED_WINDOWS = 0.75  # share of the windows that hold some lesion
BY_COMPONENT = 0.6  # share of those that are drawn by component: each as likely, however small
SMALLEST_VOXELS, LARGEST_VOXELS = 4, 100  # smaller components count less in the recall term, larger ones not at all
REAL_BACKGROUNDS = (
    0.25  # share of the cases that are real lesion-free brains with simulated lesions, where the bank holds such
)
SLICES_OF_A_CASE = 12
REFRESH_EVERY = 10  # steps
STEPS_OF_A_SEED = 10_000_000  # more than any training has
FLAIR = 2  # channel
FLAIR_MISSING = 0.5  # share of the cases shown without FLAIR to a member that must do without it at times
FLAIR_DISTURBED = 0.5  # share of the others whose FLAIR has another contrast, and lies up to 2 voxels away


class Source(Protocol):
    """What batches are drawn from."""

    def draw(self, draw: Draw, *, at_2mm: bool) -> tuple[Tensor, Tensor, float]:
        """A random case, scanned anew: images (3, z, y, x), label (z, y, x), and its in-plane voxel size in mm."""

    def refresh(self) -> None:
        """Look for what has come meanwhile."""

    def __len__(self) -> int: ...


class Bank:
    """A folder of cases, and perhaps real backgrounds, that may grow while it is read, but not lose a case; or some `paths` of it.

    `shared` holds the shapes of the lesions that are put into backgrounds; it is read when the first one is drawn.
    """

    def __init__(self, folder: Path, shared: Path | None = None, paths: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.shared = shared
        self._only = sorted(paths) if paths is not None else None
        self._paths: list[Path] = []
        self._backgrounds: list[Path] = []
        self.refresh()

    def refresh(self) -> None:
        self._paths = self._only if self._only is not None else sorted(self.folder.glob("case_*.npz"))
        self._backgrounds = sorted(self.folder.glob("background_*.npz")) if self.shared else []
        if not self._paths:
            raise FileNotFoundError(
                f"{self.folder} holds no simulated case: run python -m training.simulate --out {self.folder} first"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def draw(self, draw: Draw, *, at_2mm: bool) -> tuple[Tensor, Tensor, float]:
        """A random case, scanned anew; artefacts only come to what has no real ones."""
        if not self._backgrounds or not draw.chance(REAL_BACKGROUNDS):
            images, label, spacing_mm, real = _load(draw.choice(self._paths), at_2mm=at_2mm)
            return rescan(images, draw, artefacts=not real), label, spacing_mm[1]
        images, _, spacing_mm, _ = _load(draw.choice(self._backgrounds), at_2mm=at_2mm)
        images, label = with_lesions(images, spacing_mm, self._library(), draw)
        return rescan(images, draw, artefacts=False), label, spacing_mm[1]

    def _library(self) -> LesionLibrary:
        assert self.shared is not None
        return load_lesions(self.shared).part(held_out=False)


@dataclass(frozen=True)
class Mixed:
    """Cases of two sources: of the second one with a probability."""

    first: Source
    second: Source
    share: float

    def draw(self, draw: Draw, *, at_2mm: bool) -> tuple[Tensor, Tensor, float]:
        """A case of either."""
        source = self.second if draw.chance(self.share) else self.first
        return source.draw(draw, at_2mm=at_2mm)

    def refresh(self) -> None:
        """Both."""
        self.first.refresh()
        self.second.refresh()

    def __len__(self) -> int:
        return len(self.first) + len(self.second)


def _load(path: Path, *, at_2mm: bool) -> tuple[Tensor, Tensor, tuple[float, float, float], bool]:
    """Images (3, z, y, x), label (z, y, x; zeros for a background), voxel size (z, y, x) in mm, and whether it is a real patient."""
    with np.load(path) as case:
        suffix = "_2mm" if at_2mm and "images_2mm" in case else ""
        images = torch.from_numpy(case["images" + suffix].astype(np.float32))
        name = "label" + suffix
        label = torch.from_numpy(case[name].astype(np.float32)) if name in case else torch.zeros_like(images[0])
        z, y, x = (2.0, 2.0, 2.0) if suffix else (float(mm) for mm in case["spacing_mm"])
        real = bool(case["real"]) if "real" in case else False
    return images, label, (z, y, x), real


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """The batch of each step: the same for one seed and step, whoever draws it, and however often training was interrupted."""

    spec: MemberSpec
    source: Source
    seed: int

    def __getitem__(self, step: int) -> Batch:
        if step % REFRESH_EVERY == 0:
            self.source.refresh()
        return draw_batch(self.spec, self.source, Draw(self.seed * STEPS_OF_A_SEED + step))

    def since(self, step: int, workers: int) -> Iterator[Batch]:
        """Yield batches from a step on, without end; drawn ahead by worker processes, or (0) on demand."""
        if workers == 0:
            return (self[number] for number in itertools.count(step))
        loader: DataLoader[Batch] = DataLoader(
            self,
            batch_size=None,
            sampler=itertools.count(step),
            num_workers=workers,
            prefetch_factor=2,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


def draw_batch(spec: MemberSpec, bank: Source, draw: Draw) -> Batch:
    """Images (n, channels, ...), labels (n, ...), the weight of every voxel, and its share of the recall (see `recall_share`)."""
    examples: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(examples) < spec.batch:
        images, label, in_plane = bank.draw(draw, at_2mm=spec.dimensions == 3)
        images = images[: spec.images]
        if "FLAIR?" in spec.channels:
            images[FLAIR] = _disturbed_flair(images[FLAIR], images[0] > 0, draw)
        images, label = mirror(images, label, draw)
        weight = component_weight(label)
        if spec.dimensions == 3:
            examples.append(_window(images, label, weight, spec.training_patch, draw))
        else:
            examples += _slices(images, label, weight, in_plane, spec, draw)
    images, labels, weights = (torch.stack(part) for part in zip(*examples[: spec.batch], strict=True))
    return images, labels, weights, torch.stack([recall_share(label) for label in labels])


def _disturbed_flair(flair: Tensor, brain: Tensor, draw: Draw) -> Tensor:
    """Return FLAIR (z, y, x) as it is, or 0 everywhere as where it is missing, or with another contrast and some voxels away."""
    if draw.chance(FLAIR_MISSING):
        return torch.zeros_like(flair)
    if not draw.chance(FLAIR_DISTURBED):
        return flair
    shift = [draw.integer(-1, 2), draw.integer(-2, 3), draw.integer(-2, 3)]
    return torch.roll(flair, shift, (0, 1, 2)) ** draw.uniform(0.6, 1.6) * brain


def recall_share(label: Tensor) -> Tensor:
    """Weights (z, y, x or y, x) whose sum with the probabilities is the mean soft recall of the small components; 0 elsewhere."""
    components, count = _components(label)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    shares = np.where(sizes <= LARGEST_VOXELS, 1 / sizes.clip(SMALLEST_VOXELS), 0.0)
    shares[0] = 0.0
    share = shares[components]
    return torch.from_numpy((share / max(share.sum(), 1e-6)).astype(np.float32))


def _components(label: Tensor) -> tuple[AnyArray, int]:
    """The label's connected components (faces, edges, corners), numbered from 1, and how many there are."""
    components, count = ndimage.label(label.numpy(), structure=np.ones((3,) * label.ndim))
    return components, int(count)


def component_weight(label: Tensor) -> Tensor:
    """1 in the background, more in small components, so that a large infarct doesn't drown the emboli."""
    components, count = _components(label)
    sizes = np.bincount(components.ravel(), minlength=count + 1).clip(1)
    weights = np.sqrt(TYPICAL_COMPONENT_VOXELS / sizes).clip(1.0, LARGEST_WEIGHT)
    weights[0] = 1.0
    return torch.from_numpy(weights[components].astype(np.float32))


def _window(
    images: Tensor, label: Tensor, weight: Tensor, size: Sequence[int], draw: Draw
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window; mostly one that holds a lesion voxel."""
    stack = torch.cat([images, label[None], weight[None]])
    target = _lesion_voxel(label, _components(label), draw) if draw.chance(LESIONED_WINDOWS) else None
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


def _lesion_voxel(label: Tensor, components: tuple[AnyArray, int], draw: Draw) -> list[int] | None:
    """A random lesion voxel, often of a component that was drawn first."""
    numbered, count = components
    if count and draw.chance(BY_COMPONENT):
        voxels = torch.from_numpy(np.argwhere(numbered == draw.integer(1, count + 1)))
    else:
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
    components = _components(stack[-2])
    chosen = []
    for _ in range(SLICES_OF_A_CASE):
        voxel = _lesion_voxel(stack[-2], components, draw) if draw.chance(0.55) else None
        at = voxel[0] if voxel else draw.integer(0, depth)
        rows = [min(max(at + offset, 0), depth - 1) for offset in NEIGHBOURS]
        chosen.append((torch.cat([stack[:-2, row] for row in rows]), stack[-2, at], stack[-1, at]))
    return chosen
