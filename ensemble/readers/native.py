"""What an image that ITK has read must have before it is ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import Grid

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings would go to stderr

#: Largest deviation of the direction matrix's columns from unit length and right angles (as cosines).
SKEW = 1e-3
#: More voxels than any brain image has; a damaged header may ask for as many as it likes.
MOST_VOXELS = 150_000_000


def refuse_impossible_place(grid: Grid, path: Path, label: str) -> None:
    """Raise InputRefused for a grid without finite numbers, or with axes that are not at right angles.

    Such axes can't be written to NIfTI, so that the mask would lie elsewhere.
    """
    direction = np.reshape(grid.direction, (3, 3))
    finite = bool(np.isfinite(grid.affine).all()) and min(grid.spacing_mm) > 0
    if not finite or np.abs(direction.T @ direction - np.eye(3)).max() > SKEW:
        rows = "; ".join(" ".join(f"{number:.4g}" for number in row) for row in grid.affine[:3])
        raise InputRefused(
            f"the {label} image's header names no place in the world",
            where=path,
            found=f"voxel to world (LPS, mm): {rows}",
            do="export it again, with axes at right angles",
        )


def last_line(error: Exception) -> str:
    """What an ITK error says at its end, which is the part for people."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
