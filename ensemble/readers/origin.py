"""The source of each slice of an image read from DICOM, to which derived objects must refer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(frozen=True)
class SourceFrame:
    """The stored image, or frame of a multi-frame image, that holds a slice. Mosaic tiles are not frames."""

    sop_class: str
    sop_instance: str
    series: str
    number: int | None
    """Of the frame in its file, from 1; None if the file holds a single frame."""


@dataclass(frozen=True)
class SourceSlice:
    """One slice of an image, with the DICOM frames from which it was made."""

    position: tuple[float, ...]
    """Position of the centre of its first voxel (LPS, mm), as stated by the file."""
    frames: tuple[SourceFrame, ...]
    """What holds it: several where volumes were averaged."""


@dataclass(frozen=True, eq=False)
class DicomOrigin:
    """The DICOM series behind an image."""

    study: Dataset
    """Attributes of patient, study and frame of reference (see `readers/dicom/study.py`); no private ones."""
    orientation: tuple[float, ...]
    """Directions along a row and down a column of its slices, as cosines."""
    spacing: tuple[float, ...]
    """Between rows, between columns, mm."""
    slices: tuple[SourceSlice, ...]
    """By index z of the image's array, whose planes (y, x) are the rows and columns of the stored images."""
