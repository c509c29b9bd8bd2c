"""ITK as a library that must not write to our streams, and what its images must have before they are ours."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import Grid

log = logging.getLogger(__name__)

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


@contextmanager
def native_stderr_to_log() -> Iterator[None]:
    """Image libraries write to the process's stderr by themselves, which marks a job with a warning: send it to our log."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr to keep clean
        yield
        return
    with tempfile.TemporaryFile() as catcher:
        os.dup2(catcher.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            catcher.seek(0)
            if said := catcher.read().decode(errors="replace").strip():
                log.debug("image library: %s", said)


def last_line(error: Exception) -> str:
    """What an ITK error says at its end, which is the part for people."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
