"""What readers return: the images of one case as stored in its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ensemble.errors import InputRefused
from ensemble.readers.origin import DicomOrigin
from ensemble.types import FloatArray, Modality
from ensemble.volume import Volume

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LowBImage:
    """The image of lowest b-value in the DWI's file or series, from which an ADC can be computed."""

    array: FloatArray
    """(z, y, x), float32, on the DWI's grid."""
    b: float
    """Its b-value, and that of the DWI, s/mm^2."""
    dwi_b: float


@dataclass(frozen=True)
class RawImage:
    """One image as read: its file is complete and holds a 3-D scalar image; nothing else is checked yet."""

    path: Path
    """An image file; or the folder or archive of a DICOM series."""
    volume: Volume
    """float32, each image on its own grid."""
    notes: tuple[str, ...] = ()
    """What the reader chose or found odd, one sentence each."""
    low_b: LowBImage | None = None
    """The low-b image of a DWI, if requested."""
    origin: DicomOrigin | None = None
    """Of an image read from DICOM: which stored image holds each slice."""


@dataclass(frozen=True)
class RawCase:
    """The images of one case, each on its own grid."""

    name: str
    images: Mapping[Modality, RawImage]
    seconds: float = 0.0
    """How long reading took."""


@contextmanager
def attach_notes(notes: Iterable[str]) -> Iterator[None]:
    """Attach notes to any refusal raised in the block, because they may explain it."""
    try:
        yield
    except InputRefused as refused:
        refused.notes = tuple(dict.fromkeys((*notes, *refused.notes)))
        raise


def attach_reader_notes(step: Callable[Concatenate[RawCase, P], R]) -> Callable[Concatenate[RawCase, P], R]:
    """Wrap a preparation step so that its refusals include the readers' notes."""

    @wraps(step)
    def noting(raw: RawCase, *arguments: P.args, **options: P.kwargs) -> R:
        with attach_notes(note for image in raw.images.values() for note in image.notes):
            return step(raw, *arguments, **options)

    return noting
