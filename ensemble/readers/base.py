"""What readers give: the images of one case as they stand in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble.types import FloatArray, Modality
from ensemble.volume import Volume


@dataclass(frozen=True)
class LowB:
    """The image of lowest b-value beside a DWI, in the same file or series: what an ADC can be computed of."""

    array: FloatArray
    """(z, y, x), float32, on the DWI's grid."""
    b: float
    """Its b-value, and that of the DWI, s/mm^2."""
    dwi_b: float


@dataclass(frozen=True)
class RawImage:
    """One image as read: nothing checked but that its files are whole and hold a 3-D scalar image."""

    path: Path
    """An image file; or the folder or archive of a DICOM series."""
    volume: Volume
    """float32, each image on its own grid."""
    notes: tuple[str, ...] = ()
    """What the reader chose or found odd, one sentence each."""
    low_b: LowB | None = None
    """Beside a DWI, where it was asked for."""


@dataclass(frozen=True)
class RawCase:
    """The images of one case, each on its own grid."""

    name: str
    images: Mapping[Modality, RawImage]
    seconds: float = 0.0
    """How long reading took."""
