"""Checks of the geometry of an image read by ITK."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import MAX_SKEW, ROUNDING_VOXELS, Grid
from ensemble.geometry import MAX_VOXELS as MAX_VOXELS
from ensemble.text import replace_undecodable

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings would go to stderr

#: Deviation of a direction matrix from right angles (as cosines) below which it is as straight as float32 writes it.
_STRAIGHT = 1e-6


def orthonormalize_direction(grid: Grid, path: Path, label: str, notes: list[str]) -> Grid:
    """Return the grid with the nearest orthonormal direction matrix; the grid itself if it has one already.

    Other axes can't be written to NIfTI, so that the mask would lie elsewhere. What moves more than rounding does is noted. Raises
    InputRefused for a grid without finite numbers, or with axes that are not at right angles.
    """
    direction = np.reshape(grid.direction, (3, 3))
    finite = bool(np.isfinite(grid.affine).all()) and min(grid.spacing_mm) > 0
    if not finite or (skew := np.abs(direction.T @ direction - np.eye(3)).max()) > MAX_SKEW:
        rows = "; ".join(" ".join(f"{number:.4g}" for number in row) for row in grid.affine[:3])
        raise InputRefused(
            f"the {label} image's header does not define a position in space",
            where=path,
            found=f"voxel to world (LPS, mm): {rows}",
            do="export it again, with orthogonal axes",
        )
    if skew <= _STRAIGHT:
        return grid
    left, _, right = np.linalg.svd(direction)
    straight = replace(grid, direction=tuple((left @ right).ravel().tolist()))
    if (moved := grid.distance_voxels(straight)) > ROUNDING_VOXELS:
        notes.append(
            f"{label}: axes not quite orthogonal, probably by rounding: made orthogonal (moved by up to {moved:.2g} voxels)"
        )
    return straight


def last_itk_line(error: Exception) -> str:
    """Return the last line of an ITK error, the part meant for people."""
    lines = [line.strip() for line in replace_undecodable(str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
