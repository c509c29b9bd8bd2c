"""What readers give: the images of one case as they stand in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble.types import Modality
from ensemble.volume import Volume


@dataclass(frozen=True)
class RawImage:
    """One image as read: nothing checked but that the file is whole and holds a 3-D scalar image."""

    path: Path
    volume: Volume
    """float32, each image on its own grid."""


@dataclass(frozen=True)
class RawCase:
    """The images of one case, each on its own grid."""

    name: str
    images: Mapping[Modality, RawImage]
    seconds: float = 0.0
    """How long reading took."""
