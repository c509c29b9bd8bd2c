"""The template for findings: ICBM 2009a symmetric, T1, 2 mm, with its atlas (licences in `data/NOTICE.md`).

Both halves are mirror images, so only the left half's structures are stored: `python -m training.structures` makes the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np

from ensemble.geometry import Grid
from ensemble.types import BoolArray, FloatArray
from ensemble.volume import Volume

#: As BIDS and TemplateFlow call it.
SPACE = "MNI152NLin2009aSym"
DATA = Path(__file__).resolve().parent / "data"
T1_FILE, STRUCTURES_FILE = f"tpl-{SPACE}_res-2_T1w.nii.gz", f"tpl-{SPACE}_res-2_desc-left_probseg.nii.gz"
#: Of the shipped files: symmetric about x = 0.
GRID = Grid((99, 117, 95), (2.0, 2.0, 2.0), (-98.0, -98.0, -72.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
#: Of the template as published, on which `--save-mni` writes: 197 x 233 x 189 voxels of 1 mm.
FULL_GRID = Grid((197, 233, 189), (1.0, 1.0, 1.0), (-98.0, -98.0, -72.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


class AtlasStructure(IntEnum):
    """The structures of the atlas, in the order of its volumes."""

    CORTEX = 0
    WHITE_MATTER = 1
    DEEP_GREY = 2
    CEREBELLUM = 3
    BRAIN_STEM = 4
    CSF = 5

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ") if self is not AtlasStructure.CSF else "CSF"


@dataclass(frozen=True)
class Template:
    """The template brain and its probabilistic atlas on one grid (LPS: x increases to the patient's left)."""

    t1: Volume
    """float32, 0 outside the brain."""
    left: FloatArray
    """float32 (structure, z, y, x): probability of a structure on the left. Mirrored along x: on the right."""

    @property
    def hull(self) -> BoolArray:
        """The brain and the CSF around it (z, y, x)."""
        return np.asarray(self.t1.array > 0)


@cache
def shipped_template() -> Template:
    """Return the shipped template. Raises OSError if its files are missing."""
    return read_template(DATA)


def read_template(folder: Path) -> Template:
    """Read a template that `training.structures` wrote."""
    t1 = _read(folder / T1_FILE).astype(np.float32)
    return Template(Volume(t1, GRID), _read(folder / STRUCTURES_FILE).astype(np.float32) / 255)


def _read(path: Path) -> FloatArray:
    import SimpleITK as sitk

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the installation is incomplete")
    image = sitk.ReadImage(str(path))
    array: FloatArray = sitk.GetArrayFromImage(image)
    if array.shape[-3:] != GRID.shape_zyx:
        raise ValueError(f"{path} does not lie on the template's grid: {array.shape}")
    return array
