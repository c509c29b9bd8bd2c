"""Read one image file, and refuse what would otherwise be read wrongly without a warning."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.files import lexists, read_bounded, unreadable_reason
from ensemble.readers.b_values import select_dwi, select_low_b
from ensemble.readers.base import LowBImage, RawCase, RawImage
from ensemble.readers.dicom.read import Examination, is_read_as_dicom, open_examination, read_dicom
from ensemble.readers.geometry_checks import orthonormalize_direction
from ensemble.readers.names import parse_image_name, stem
from ensemble.readers.sources import link_notes
from ensemble.readers.stored import StoredImage, not_3d_error, read_stored
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

#: Higher than the b-value of any scanner, in s/mm^2.
_MAX_B = 1e5
#: More than any file of b-values holds.
_MAX_B_BYTES = 1 << 20
#: File names that state what an image shows, not which subject.
_GENERIC = {"diffusion", "image"}


def read_case_files(name: str, files: Mapping[Modality, Path], *, adc_is_held: bool = False) -> RawCase:
    """Read one file, DICOM folder or archive per modality; without ADC, also the image needed to compute it.

    `adc_is_held` means that the caller has an ADC map in memory, so none will be computed.

    Raises InputRefused naming the first that can't be read, or why no ADC can be computed.
    """
    started = time.perf_counter()
    for path in files.values():
        # one folder or archive may hold several series; one file is one image
        if not is_read_as_dicom(path) and sum(other == path for other in files.values()) > 1:
            raise InputRefused(
                "the same file is given for two modalities", where=path, do="give each image its own file"
            )
    images: dict[Modality, RawImage] = {}
    with ExitStack() as open_ones:
        examinations: dict[Path, Examination] = {}  # headers of one folder are read once, whatever is taken of it
        for modality, path in files.items():
            with_low_b = modality is Modality.DWI and Modality.ADC not in files and not adc_is_held
            if is_read_as_dicom(path):
                if path not in examinations:
                    examinations[path] = open_ones.enter_context(open_examination(path, modality.label))
                images[modality] = examinations[path].read(modality, with_low_b=with_low_b)
            else:
                images[modality] = read_image(path, modality, with_low_b=with_low_b)
    return RawCase(name, images, time.perf_counter() - started)


def read_image(path: Path, modality: Modality, *, with_low_b: bool = False) -> RawImage:
    """Read a whole 3-D scalar image as float32.

    From a 4-D file read its only volume, or the diffusion-weighted one of a DWI (and the one with the lowest b-value, if requested).

    Raises InputRefused if the file is missing, of an unsupported format, truncated or damaged, or not 3-D and scalar, or if its header has
    no valid geometry. A folder or .zip is read as DICOM.
    """
    label = modality.label
    if is_read_as_dicom(path):
        return read_dicom(path, modality, with_low_b=with_low_b)
    stored = read_stored(path, label)
    notes = [*stored.remarks, *link_notes(path, label)]
    array, low = _single_volume(stored, path, modality, notes, with_low_b=with_low_b)
    grid = orthonormalize_direction(stored.grid, path, label, notes)
    return RawImage(path, Volume(array, grid), tuple(notes), low)


def case_name(dwi: Path) -> str:
    """Return the name of a case: the DWI's file name without suffix, or its folder's name if the file is only called "dwi"."""
    name, folder = stem(dwi), dwi.absolute().parent.name
    shown = parse_image_name(name)
    generic = name.lower() in _GENERIC or (shown is not None and not shown.case)
    return folder if generic and folder else name


def _single_volume(
    stored: StoredImage, path: Path, modality: Modality, notes: list[str], *, with_low_b: bool
) -> tuple[AnyArray, LowBImage | None]:
    """Return the single volume (z, y, x) float32 of an image that shows the modality.

    Also return the volume with the lowest b-value, if requested.
    """
    label, size = modality.label, stored.array.shape[::-1]
    values = stored.values(np.float32)
    if (none := ~np.isfinite(values)).any() and (beyond := int(np.isfinite(stored.values(np.float64)[none]).sum())):
        notes.append(f"{label}: {beyond} values are too large for float32 and become infinite")
    count = size[3] if len(size) == 4 else 1
    b_file = path.with_name(stem(path) + ".bval")
    b_values = _b_values(b_file, count) if modality is Modality.DWI else None
    if len(size) == 4 and count == 1:
        values = values[0]
    volumes = values if values.ndim == 4 else values[None]
    if modality is Modality.DWI and (values.ndim == 4 or b_values is not None):
        values, note = select_dwi(volumes, b_values, path, b_file.name)
        notes.append(note)
    if values.ndim != 3:
        raise not_3d_error(path, label, size)
    if min(values.shape) < 2:
        raise InputRefused(
            f"the {label} image is a single slice",
            where=path,
            found=f"size {' x '.join(map(str, size))}",
            do="give the whole volume",
        )
    return values, select_low_b(volumes, b_values, path) if with_low_b else None


def _b_values(beside: Path, volumes: int) -> Sequence[float] | None:
    """Return the b-values in the .bval file beside an image (FSL's format); None if there is none."""
    if not lexists(beside):
        return None
    try:
        b_values = [float(text) for text in read_bounded(beside, _MAX_B_BYTES).decode("ascii").split()]
        problem = (
            "" if len(b_values) == volumes else f"{len(b_values)} numbers for {volumes} volume{'s' * (volumes > 1)}"
        )
    except OSError as error:
        why = unreadable_reason(beside, error)
        raise InputRefused(f"the DWI's .bval file {why.what}", where=beside, found=why.found, do=why.do) from error
    except ValueError as error:
        problem = str(error)
    if problem or not all(0 <= b <= _MAX_B for b in b_values):
        raise InputRefused(
            "the DWI's .bval file is not valid",
            where=beside,
            found=problem or ", ".join(f"{b:g}" for b in b_values),
            do="write one b-value per volume, in one line, in s/mm^2 (1000, not 1e9 s/m^2)",
        )
    return b_values
