"""Plots of an evaluation: Dice against lesion volume, and Bland-Altman of the volumes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensemble.evaluate.scores import Score

_LINEAR_BELOW_ML = 0.1


def draw_plots(scores: Mapping[str, Sequence[Score]], path: Path) -> None:
    """Write both plots of each method, by name, into one PNG."""
    figure = Figure(figsize=(11, 4.6 * len(scores)), layout="constrained")
    for (left, right), (name, own) in zip(figure.subplots(len(scores), 2, squeeze=False), scores.items(), strict=True):
        _draw(left, right, f"{name}: " * (len(scores) > 1), own)
    path.write_bytes(as_png(figure))


def as_png(figure: Figure) -> bytes:
    """Return a figure as PNG. Characters that the font lacks become boxes, without a warning."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _draw(left: Axes, right: Axes, name: str, scores: Sequence[Score]) -> None:
    true, predicted = np.array([s.truth_ml for s in scores]), np.array([s.predicted_ml for s in scores])
    left.scatter(true, [s.dice for s in scores], s=18, alpha=0.7, edgecolors="none")
    left.set(
        ylim=(-0.03, 1.03),
        xlabel="true lesion volume (ml)",
        ylabel="Dice",
        title=f"{name}Dice by volume, {len(scores)} cases".replace("$", r"\$"),
    )
    _volumes(left, true)
    _bland_altman(right, true, predicted)


def _bland_altman(ax: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    """Plot difference against mean of two measurements, with mean difference and limits of agreement (Bland and Altman 1986)."""
    difference = predicted - true
    ax.scatter((true + predicted) / 2, difference, s=18, alpha=0.7, edgecolors="none")
    bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    for level, style in ((bias, "-"), (bias - spread, "--"), (bias + spread, "--")):
        ax.axhline(level, color="0.3", linestyle=style, linewidth=1)
        ax.annotate(
            f"{level:+.2f}", (1, level), xycoords=("axes fraction", "data"), va="bottom", ha="right", fontsize=8
        )
    ax.set(
        xlabel="mean of true and predicted volume (ml)",
        ylabel="predicted - true (ml)",
        title="Bland-Altman (lines: mean, 95 % limits)",
    )
    _volumes(ax, (true + predicted) / 2)


def _volumes(ax: Axes, volumes_ml: np.ndarray) -> None:
    """Use a scale for volumes that span four decades and may be 0."""
    ax.set_xscale("symlog", linthresh=_LINEAR_BELOW_ML)
    ax.set_xlim(-_LINEAR_BELOW_ML / 4, max(1.0, 2 * float(volumes_ml.max())))
    ax.grid(alpha=0.25)
