"""Labels as readers draw them: generous around emboli, along the visible border of large infarcts, blind to what noise hides.

What ISLES'22's outlines look like: inside lesions above 0.3 ml the faintest tenth of the voxels has 1.09 times the background's DWI, the
shell around them 1.00; 16 % of one lesion is CSF (closed over sulci); single bright voxels are outlined as 3 x 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ensemble.types import AnyArray, BoolArray, FloatArray
from training.draw import Draw

SMALL_ML = 0.3  # components below this are widened, larger ones follow the visible border
MIN_VISIBLE_ML = 0.1  # components below this are visible only if they are bright enough
BOX = np.ones((3, 3, 3), dtype=bool)
CROSS = ndimage.generate_binary_structure(3, 1)
STEP_MM = 2.0  # how far an outline is widened


@dataclass(frozen=True)
class Reader:
    """How one reader outlines; readers differ from patient to patient."""

    share: float
    """Of a voxel that is damaged, from which on it belongs to the lesion."""
    widens_small: float
    """Share of the small components that are outlined a step of 2 mm wider."""
    widens_large: float
    """The same of the large ones."""
    border: float
    """DWI, times normal tissue, below which a voxel at the border of a large component is left out."""
    sees: float
    """DWI, times normal tissue, that the brightest tenth of a small component must reach to be visible."""


def draw_reader(draw: Draw) -> Reader:
    return Reader(
        share=draw.uniform(0.2, 0.45),
        widens_small=draw.uniform(0.0, 0.9),
        widens_large=draw.uniform(0.0, 0.75),
        border=draw.uniform(1.0, 1.12),
        sees=draw.uniform(1.25, 1.45),
    )


def outline(
    damaged: Tensor,
    dwi: Tensor,
    brain: Tensor,
    spacing_mm: tuple[float, float, float],
    draw: Draw,
    reader: Reader | None = None,
) -> Tensor:
    """The label (uint8; z, y, x) that a reader draws.

    Args:
        damaged: 0-1 (z, y, x), share of each voxel that is infarcted.
        dwi: (z, y, x), times normal tissue, with noise: what the reader sees.
        brain: bool (z, y, x).
        spacing_mm: (z, y, x).
    """
    reader = reader or draw_reader(draw)
    image, inside = dwi.cpu().numpy(), brain.cpu().numpy()
    label = (damaged.cpu().numpy() > reader.share) & inside
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    components, count = ndimage.label(label, structure=BOX)
    drawn = np.zeros_like(label)
    steps = max(1, round(STEP_MM / spacing_mm[1]))
    for place, number in zip(ndimage.find_objects(components), range(1, count + 1), strict=True):
        window = tuple(
            slice(max(0, s.start - steps), min(n, s.stop + steps)) for s, n in zip(place, label.shape, strict=True)
        )
        component = components[window] == number
        volume_ml = float(component.sum()) * voxel_ml
        visible = trimmed(component, image[window], reader.border) if volume_ml >= SMALL_ML else component
        if not is_visible(image[window][visible], volume_ml, reader):
            continue
        if draw.chance(reader.widens_small if volume_ml < SMALL_ML else reader.widens_large):
            component = widened(component, spacing_mm, steps, box=volume_ml < SMALL_ML and draw.chance(0.5), draw=draw)
        if volume_ml >= SMALL_ML:
            component = trimmed(component, image[window], reader.border)
        drawn[window] |= component
    return torch.from_numpy((drawn & inside).astype(np.uint8)).to(damaged.device)


def is_visible(dwi: FloatArray, volume_ml: float, reader: Reader) -> bool:
    """Whether a component with these DWI values is visible: half of it above the border value, or, of a small one, the brightest tenth."""
    if volume_ml < MIN_VISIBLE_ML:
        return float(np.percentile(dwi, 90)) >= reader.sees
    return bool(dwi.size) and float(np.median(dwi)) >= reader.border


def widened(
    component: BoolArray, spacing_mm: tuple[float, float, float], steps: int, *, box: bool, draw: Draw
) -> BoolArray:
    """The component and `steps` voxels around it in its slices (a square with `box`), at times in thin neighbouring slices, too."""
    structure = (BOX if box else CROSS).copy()
    if spacing_mm[0] > 1.5 * STEP_MM or draw.chance(0.65):
        structure[[0, 2]] = False
    return np.asarray(ndimage.binary_dilation(component, structure, iterations=steps))


def trimmed(component: BoolArray, dwi: FloatArray, border: float) -> BoolArray:
    """The component without the voxels of its rim that are no brighter than `border`; what it encloses stays."""
    core = ndimage.binary_erosion(component, CROSS)
    return np.asarray(component & (core | (dwi >= border)))


def style(label: AnyArray, dwi: FloatArray, brain: BoolArray, voxel_ml: float) -> dict[str, float]:
    """How lesions above `SMALL_ML` are outlined: DWI (times normal) of the faintest tenth inside, and the median of the shell outside."""
    components, count = ndimage.label(label > 0, structure=BOX)
    sizes = np.bincount(components.ravel(), minlength=count + 1) * voxel_ml
    sizes[0] = 0.0
    large = (sizes >= SMALL_ML)[components]
    shell = ndimage.binary_dilation(large, CROSS) & (components == 0) & brain
    return {
        "faintest_tenth": float(np.percentile(dwi[large], 10)) if large.any() else float("nan"),
        "shell": float(np.median(dwi[shell])) if shell.any() else float("nan"),
    }
