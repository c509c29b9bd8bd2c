"""The overlay picture: DWI and ADC slices through the largest lesions, with the outline of the mask."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensemble.metrics import lesion_components
from ensemble.outputs.report.run_report import RESEARCH_USE
from ensemble.outputs.report.views import WINDOWS, brain_box, case_headline
from ensemble.pipeline import Result
from ensemble.text import escape_invisible
from ensemble.types import AnyArray, Modality

_COLUMNS = 4
_SHOWN = (Modality.DWI, Modality.ADC)
_MASK, _DISPUTED = "#ff3b30", "#ffd60a"


def draw_overlay(result: Result, destination: Path | BinaryIO, title: str = "") -> None:
    """Write axial DWI and ADC slices (at most four of each) as PNG, with the outline of the mask in red.

    Yellow outlines what at least one member votes lesion. Slices go through the largest lesions; without a lesion they are spread over the
    brain. The orientation is radiological (the patient's left is on the right). The title gives case name, lesion count and volume (ml),
    unless another is given.
    """
    canonical = result.case.grid.canonical()
    mask = canonical.apply(result.fused.mask.array)
    votes = canonical.apply(result.fused.votes.array)
    slices = _slices(mask, canonical.apply(result.case.brain.array))
    box = brain_box(canonical.apply(result.case.brain.array))
    spacing = canonical.spacing(result.case.grid.spacing_zyx_mm)
    figure = Figure(figsize=(3.1 * len(slices), 7.1), facecolor="black", layout="constrained")
    axes = figure.subplots(len(_SHOWN), len(slices), squeeze=False)
    for row, modality in enumerate(_SHOWN):
        low, high = WINDOWS[modality]
        image = canonical.apply(result.case.tissue_normalized[modality].array)
        for column, z in enumerate(slices):
            ax: Axes = axes[row, column]
            ax.imshow(image[z][box], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2])
            _outline(ax, votes[z][box] > 0, _DISPUTED, 0.7)
            _outline(ax, mask[z][box], _MASK, 1.1)
            _letters(ax)
            ax.set_title(f"{modality.label}  slice {z + 1}/{mask.shape[0]}", color="white", fontsize=9)
    # file and member names are text, whatever dollar signs they hold
    figure.suptitle(title or case_headline(result), color="white", fontsize=12, parse_math=False)
    figure.supxlabel(escape_invisible(_legend(result), keep="\n"), color="0.7", fontsize=8, parse_math=False)
    FigureCanvasAgg(figure).print_png(destination)


def _legend(result: Result) -> str:
    voters = result.fused.voters
    disputed = "" if len(voters) == 1 else "; yellow: at least one member votes lesion"
    return f"red: mask of {len(voters)} voting members ({', '.join(voters)}){disputed}\n{RESEARCH_USE}"


def _slices(mask: AnyArray, brain: AnyArray) -> list[int]:
    """Choose the axial slices: through the middle of the largest lesions, one each; evenly spaced if there is no lesion."""
    components, count = lesion_components(mask)
    if count == 0:
        low, high = np.flatnonzero(brain.any(axis=(1, 2)))[[0, -1]]
        return sorted({int(z) for z in np.linspace(low, high, _COLUMNS + 2)[1:-1]})
    largest = np.argsort(-np.bincount(components.ravel())[1:]) + 1
    chosen: list[int] = []
    for label in largest:
        area = (components == label).sum(axis=(1, 2))
        if (z := int(area.argmax())) not in chosen:
            chosen.append(z)
        if len(chosen) == _COLUMNS:
            break
    # few lesions: further slices, spread so that each stands for the same share of the lesion volume
    share = np.cumsum(mask.sum(axis=(1, 2))) / mask.sum()
    spread = [int(np.searchsorted(share, (k + 0.5) / _COLUMNS)) for k in range(_COLUMNS)]
    spare = [z for z in dict.fromkeys(spread) if z not in chosen]
    return sorted(chosen + spare[: _COLUMNS - len(chosen)])


def _outline(ax: Axes, region: AnyArray, colour: str, width: float) -> None:
    if region.any():
        with warnings.catch_warnings():  # a region that fills the box has no contour
            warnings.simplefilter("ignore", UserWarning)
            ax.contour(region.astype(float), levels=[0.5], colors=colour, linewidths=width)


def _letters(ax: Axes) -> None:
    ax.set_axis_off()
    for x, y, letter in ((0.02, 0.5, "R"), (0.98, 0.5, "L"), (0.5, 0.98, "A"), (0.5, 0.02, "P")):
        ax.text(x, y, letter, transform=ax.transAxes, color="white", fontsize=9, ha="center", va="center")
