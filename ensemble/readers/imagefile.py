"""One image file -> RawImage, refusing what would otherwise be read wrongly and silently."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.integrity import refuse_damaged
from ensemble.types import Modality
from ensemble.volume import Volume, from_sitk

log = logging.getLogger(__name__)

#: Kinds of image that are read, by the file name's ending in lower case. Of these a truncated file is known to be noticed.
IMAGE_SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr")
#: Kinds whose data lie in the same file as the header.
_SINGLE_FILE = (".mha", ".nii", ".nii.gz", ".nrrd")
#: Largest deviation of the direction matrix's columns from unit length and right angles (as cosines).
_SKEW = 1e-3


def read_case(name: str, files: Mapping[Modality, Path]) -> RawCase:
    """Read one file a modality. Raises InputRefused naming the first file that can't be read."""
    started = time.perf_counter()
    for path in files.values():
        if sum(other == path for other in files.values()) > 1:
            raise InputRefused("one file is given for two modalities", where=path, do="give each image its own file")
    images = {modality: read_image(path, modality) for modality, path in files.items()}
    return RawCase(name, images, time.perf_counter() - started)


def read_image(path: Path, modality: Modality) -> RawImage:
    """Read a whole 3-D scalar image as float32.

    Raises InputRefused when the file is missing, of a kind that is not read, truncated or damaged, not 3-D and scalar, or when its
    header names no place in the world. A 4-D file that holds a single volume is read as that volume.
    """
    label = modality.value.upper()
    _refuse_unreadable(path, label)
    refuse_damaged(path, label)
    try:
        with _plain_name(path) as plain, _native_stderr_to_log():
            image = _single_volume(sitk.ReadImage(str(plain)), path, label)
            volume = from_sitk(sitk.Cast(image, sitk.sitkFloat32))
    except RuntimeError as error:
        raise InputRefused(
            f"the {label} file is not a readable image, or is damaged",
            where=path,
            found=_last_line(error),
            do="open it in a viewer to see whether it is whole; copy or export it again",
        ) from error
    _refuse_impossible_place(volume, path, label)
    return RawImage(path, volume)


def stem(path: Path) -> str:
    """File name without the image ending: `a.nii.gz` -> `a`."""
    ending = image_suffix(path) or path.suffix
    return path.name[: -len(ending)] if ending else path.name


def image_suffix(path: Path) -> str:
    """The ending, in lower case, that tells which kind of image a file is; empty when it is none that we read."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), "")


def _refuse_unreadable(path: Path, label: str) -> None:
    """Say what stands between us and the file's bytes."""
    kinds = ", ".join(IMAGE_SUFFIXES)
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputRefused(
            f"the {label} image does not exist, or is a folder", where=path, do="check the path"
        ) from error
    except OSError as error:
        raise InputRefused(
            f"the {label} image can't be opened",
            where=path,
            found=f"{error.strerror} (we run as user {os.getuid()})",
            do="check the permissions of the file and of the folders above it",
        ) from error
    if not first:
        raise InputRefused(f"the {label} image is an empty file", where=path, do="copy or export it again")
    if not image_suffix(path):
        raise InputRefused(
            f"the {label} file is of no kind that is read", where=path, do=f"convert it to one of: {kinds}"
        )


def _single_volume(image: sitk.Image, path: Path, label: str) -> sitk.Image:
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise InputRefused(
            f"the {label} image is not scalar",
            where=path,
            found=f"{image.GetNumberOfComponentsPerPixel()} components of {image.GetPixelIDTypeAsString()}",
            do="give one grey value a voxel",
        )
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    size = " x ".join(map(str, image.GetSize()))
    if image.GetDimension() != 3:
        raise InputRefused(f"the {label} image is not 3-D", where=path, found=f"size {size}", do="give one 3-D volume")
    if min(image.GetSize()) < 2:
        raise InputRefused(
            f"the {label} image is a single slice", where=path, found=f"size {size}", do="give the whole volume"
        )
    return image


def _refuse_impossible_place(volume: Volume, path: Path, label: str) -> None:
    """Raise InputRefused for a header without finite numbers, or with axes that are not at right angles.

    Such axes can't be written to NIfTI, so that the mask would lie elsewhere.
    """
    grid = volume.grid
    direction = np.reshape(grid.direction, (3, 3))
    finite = bool(np.isfinite(grid.affine).all()) and min(grid.spacing_mm) > 0
    if not finite or np.abs(direction.T @ direction - np.eye(3)).max() > _SKEW:
        rows = "; ".join(" ".join(f"{number:.4g}" for number in row) for row in grid.affine[:3])
        raise InputRefused(
            f"the {label} image's header names no place in the world",
            where=path,
            found=f"voxel to world (LPS, mm): {rows}",
            do="export it again, with axes at right angles",
        )


@contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """A name of the file that image libraries can take: ITK knows no endings in capitals, and no bytes that are not UTF-8."""
    suffix = image_suffix(path)
    if (path.name.endswith(suffix) and _is_utf8(path)) or suffix not in _SINGLE_FILE:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"image{suffix}"
        link.symlink_to(path.absolute())
        yield link


def _is_utf8(path: Path) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _native_stderr_to_log() -> Iterator[None]:
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


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
