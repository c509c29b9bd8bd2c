"""A picture of a data set: lesion volumes, numbers of lesions, voxel sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Described(Protocol):
    """What the picture shows of a case."""

    @property
    def lesion_ml(self) -> float | None: ...
    @property
    def lesions(self) -> int | None: ...
    @property
    def spacing_mm(self) -> str: ...


def draw_plots(cases: Sequence[Described], path: Path) -> None:
    """Write the picture as PNG."""
    volumes = np.array([case.lesion_ml for case in cases], float)
    counts = np.array([case.lesions for case in cases], float)
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bins = np.logspace(-2, 3, 26)
    left.hist(volumes[volumes > 0].clip(bins[0], bins[-1]), bins=bins.tolist())
    left.set(xscale="log", xlabel="lesion volume (ml)", ylabel="cases", title=f"{len(cases)} cases")
    middle.scatter(volumes, counts, s=14, alpha=0.6, edgecolors="none")
    middle.set_xscale("symlog", linthresh=0.01)
    middle.set_yscale("symlog", linthresh=1)
    middle.set(xlabel="lesion volume (ml)", ylabel="lesions", title=f"{int((volumes == 0).sum())} without lesion")
    kinds = Counter(case.spacing_mm for case in cases).most_common(10)
    right.barh([kind for kind, _ in kinds], [number for _, number in kinds])
    right.invert_yaxis()
    right.set(xlabel="cases", title="voxels (mm)")
    FigureCanvasAgg(figure).print_png(str(path))
