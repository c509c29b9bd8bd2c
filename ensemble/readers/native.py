"""What an image that ITK has read must have before it is ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import MOST_SKEW, ROUNDING_VOXELS, Grid
from ensemble.geometry import MOST_VOXELS as MOST_VOXELS
from ensemble.streams import printable

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings would go to stderr

#: Deviation of a direction matrix from right angles (as cosines) below which it is as straight as float32 writes it.
_STRAIGHT = 1e-6


def straightened(grid: Grid, path: Path, label: str, notes: list[str]) -> Grid:
    """The grid with the rotation (or reflection) nearest to its direction; the grid itself where that is one.

    Other axes can't be written to NIfTI, so that the mask would lie elsewhere. What moves more than rounding does is noted. Raises
    InputRefused for a grid without finite numbers, or with axes that are not at right angles.
    """
    direction = np.reshape(grid.direction, (3, 3))
    finite = bool(np.isfinite(grid.affine).all()) and min(grid.spacing_mm) > 0
    if not finite or (skew := np.abs(direction.T @ direction - np.eye(3)).max()) > MOST_SKEW:
        rows = "; ".join(" ".join(f"{number:.4g}" for number in row) for row in grid.affine[:3])
        raise InputRefused(
            f"the {label} image's header names no place in the world",
            where=path,
            found=f"voxel to world (LPS, mm): {rows}",
            do="export it again, with axes at right angles",
        )
    if skew <= _STRAIGHT:
        return grid
    left, _, right = np.linalg.svd(direction)
    straight = replace(grid, direction=tuple((left @ right).ravel().tolist()))
    if (moved := grid.distance_voxels(straight)) > ROUNDING_VOXELS:
        notes.append(
            f"{label}: axes not quite at right angles, as of few digits: straightened (by up to {moved:.2g} voxels)"
        )
    return straight


def last_line(error: Exception) -> str:
    """What an ITK error says at its end, which is the part for people."""
    lines = [line.strip() for line in printable(str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
