"""One image file of any kind that ITK reads -> RawImage, refusing what would otherwise be read wrongly and silently."""

from __future__ import annotations

import gzip
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import Modality
from ensemble.volume import from_sitk

log = logging.getLogger(__name__)

#: Endings of images that users have (CONTRACT: .mha; hospitals and researchers: the others).
IMAGE_SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")


def read_case(name: str, files: Mapping[Modality, Path]) -> RawCase:
    """Read one file a modality. Raises InputRefused naming the first file that can't be read."""
    return RawCase(name, {modality: read_image(path, modality) for modality, path in files.items()})


def read_image(path: Path, modality: Modality) -> RawImage:
    """Read a whole 3-D scalar image as float32.

    Raises InputRefused when the file is missing, is no image, is truncated or damaged, or is not 3-D and scalar. A 4-D file
    that holds a single volume is read as that volume.
    """
    label = modality.value.upper()
    if not path.is_file():
        raise InputRefused(f"the {label} image does not exist", where=path, do="check the path")
    if path.stat().st_size == 0:
        raise InputRefused(f"the {label} image is an empty file", where=path, do="copy or export it again")
    _refuse_damaged_nifti(path, label)
    try:
        with _native_stderr_to_log():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputRefused(
            f"the {label} file is not a readable image, or is damaged",
            where=path,
            found=_last_line(error),
            do=f"give a whole file of one of these kinds: {', '.join(IMAGE_SUFFIXES)}",
        ) from error
    image = _single_volume(image, path, label)
    return RawImage(path, from_sitk(sitk.Cast(image, sitk.sitkFloat32)))


def stem(path: Path) -> str:
    """File name without the image ending: `a.nii.gz` -> `a`."""
    name = path.name
    ending = next(
        (suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)),
        path.suffix,
    )
    return name[: -len(ending)] if ending else name


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


def _refuse_damaged_nifti(path: Path, label: str) -> None:
    """ITK fills what is missing of a truncated NIfTI file with zeros and says nothing: count the bytes ourselves."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            header = file.read(352)
            needed = _nifti_bytes(header)
            present = len(header) + sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
    except (EOFError, OSError, zlib.error, struct.error) as error:
        raise InputRefused(
            f"the {label} image is damaged or truncated", where=path, found=str(error), do="copy or export it again"
        ) from error
    if needed is not None and present < needed:
        raise InputRefused(
            f"the {label} image is truncated",
            where=path,
            found=f"{present} bytes of {needed} (uncompressed)",
            do="copy or export it again",
        )


def _nifti_bytes(header: bytes) -> int | None:
    """Bytes that a NIfTI-1 or NIfTI-2 single file must have by its header (nifti.nimh.nih.gov); None for another kind of header."""
    for order in "<>":
        if struct.unpack_from(order + "i", header)[0] == 348:
            dim, bitpix, offset = (
                struct.unpack_from(order + "8h", header, 40),
                struct.unpack_from(order + "h", header, 72)[0],
                108,
            )
            voxel_offset = int(struct.unpack_from(order + "f", header, offset)[0])
        elif struct.unpack_from(order + "i", header)[0] == 540:
            dim, bitpix = struct.unpack_from(order + "8q", header, 16), struct.unpack_from(order + "h", header, 14)[0]
            voxel_offset = struct.unpack_from(order + "q", header, 168)[0]
        else:
            continue
        if not 1 <= dim[0] <= 7:
            return None
        return voxel_offset + int(np.prod([max(n, 1) for n in dim[1 : 1 + dim[0]]], dtype=object)) * bitpix // 8
    return None


@contextmanager
def _native_stderr_to_log() -> Iterator[None]:
    """Image libraries write to the process's stderr by themselves, which marks a job with a warning: send it to our log."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    kept = os.dup(2)
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
