"""One image file -> the numbers that it stores and the grid that they lie on: the one place where image files are opened.

Nothing is replaced on the way: what is no number stays none, for those to see who check values.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.readers.integrity import DAMAGE, damaged, remarks_or_refusal, unreadable
from ensemble.readers.names import IMAGE_SUFFIXES, image_suffix
from ensemble.readers.native import MOST_VOXELS, last_line
from ensemble.readers.nifti import Nifti, nifti
from ensemble.streams import native_stderr_to_log
from ensemble.types import AnyArray, FloatArray

#: What reads each kind: left to choose by content, ITK would take a TIFF or an HDF5 file that is named .mha, with a geometry made up.
_READERS = {
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".nii", ".nii.gz"), "NiftiImageIO"),
}
#: Kinds whose data lie in the same file as the header.
_SINGLE_FILE = (".mha", ".nii", ".nii.gz", ".nrrd")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A scalar image of three or four axes."""

    array: AnyArray
    """As stored: ([volume,] z, y, x), not yet scaled."""
    grid: Grid
    """Of each volume."""
    scale: tuple[float, float] = (1.0, 0.0)
    """Factor and summand that give the values."""
    remarks: tuple[str, ...] = ()
    """What is odd about the file, one sentence each."""

    def values(self, kind: type[np.floating]) -> FloatArray:
        """The values; infinite where they are too large for the kind of number."""
        slope, intercept = self.scale
        with np.errstate(over="ignore", invalid="ignore"):
            if (slope, intercept) == (1.0, 0.0):
                return self.array.astype(kind)
            scaled = np.empty(self.array.shape, kind)
            for source, target in zip(
                self.array, scaled, strict=True
            ):  # a slice or a volume at a time, for the sake of memory
                target[...] = source.astype(np.float64) * slope + intercept
            return scaled


def read_stored(path: Path, label: str) -> StoredImage:
    """Read a whole scalar image.

    Raises InputRefused when the file is missing, of a kind that is not read, truncated or damaged, too large, not scalar, or of less
    than three or more than four axes, or when its header holds what can't be.
    """
    _refuse_unreadable(path, label)
    try:
        header = nifti(path)
        if header is not None:
            return _read_nifti(header, label)
        if image_suffix(path) in (".nii", ".nii.gz"):
            raise unreadable(path, label, "no NIfTI header, compressed or not")
    except (*DAMAGE, MemoryError) as error:
        raise damaged(path, label, str(error) or type(error).__name__) from error
    remarks = remarks_or_refusal(path, label)
    try:
        with _plain_name(path) as plain, native_stderr_to_log():
            grid = _grid(plain, path, label)
            image = sitk.ReadImage(str(plain), imageIO=_READERS[image_suffix(plain)])
            return StoredImage(sitk.GetArrayFromImage(image), grid, remarks=remarks)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise unreadable(path, label, last_line(error)) from error


def _read_nifti(header: Nifti, label: str) -> StoredImage:
    remarks: list[str] = []
    if found := header.fault(remarks):
        raise damaged(header.path, label, found)
    _refuse_too_large(header.size, header.path, label)
    if header.not_scalar:
        raise _not_scalar(header.path, label, header.not_scalar)
    try:
        with header.place_for_itk() as plain, native_stderr_to_log():
            grid = _grid(plain, header.path, label)
    except (RuntimeError, struct.error) as error:
        raise unreadable(header.path, label, last_line(error)) from error
    if not header.size[:3] == grid.size or len(header.size) > 4:
        raise not_3d(header.path, label, header.size)
    lengths = None if header.sform is None else np.linalg.norm(np.reshape(header.sform, (3, 4))[:, :3], axis=0)
    if lengths is not None and np.allclose(lengths, grid.spacing_mm, rtol=1e-3):  # not where its unit is other than mm
        grid = replace(grid, sform=header.sform)
    return StoredImage(header.voxels(), grid, header.scale, tuple(f"{label}: {remark}" for remark in remarks))


def _grid(plain: Path, path: Path, label: str) -> Grid:
    """The grid of the file's first three axes, as ITK reads it. Raises InputRefused for what is no scalar image of three or four."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[image_suffix(plain)])
    reader.SetFileName(str(plain))
    reader.ReadImageInformation()
    size, axes = reader.GetSize(), reader.GetDimension()
    # before memory is asked for that a damaged header claims to need
    _refuse_too_large((*size, reader.GetNumberOfComponents()), path, label)
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise _not_scalar(path, label, f"{reader.GetNumberOfComponents()} components of {kind}")
    if axes not in (3, 4):
        raise not_3d(path, label, size)
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3] + 0.0  # without negative zeros
    x, y, z = reader.GetSpacing()[:3]
    left, posterior, superior = (mm + 0.0 for mm in reader.GetOrigin()[:3])
    return Grid(size[:3], (x, y, z), (left, posterior, superior), tuple(direction.ravel().tolist()))


def not_3d(path: Path, label: str, size: tuple[int, ...]) -> InputRefused:
    """What to tell of an image of too few axes, or of several volumes where one belongs."""
    return InputRefused(
        f"the {label} image is not 3-D", where=path, found=f"size {_by(size)}", do="give one 3-D volume"
    )


def _not_scalar(path: Path, label: str, found: str) -> InputRefused:
    return InputRefused(f"the {label} image is not scalar", where=path, found=found, do="give one grey value a voxel")


def _refuse_too_large(size: tuple[int, ...], path: Path, label: str) -> None:
    if math.prod(size) > MOST_VOXELS:
        raise InputRefused(
            f"the {label} image is too large to be a brain scan",
            where=path,
            found=f"size {_by(size)}",
            do="check the header; crop or resample it if it is right",
        )


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _refuse_unreadable(path: Path, label: str) -> None:
    """Say what stands between us and the file's bytes."""
    kinds = ", ".join(IMAGE_SUFFIXES)
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except FileNotFoundError as error:
        raise InputRefused(f"the {label} image does not exist", where=path, do="check the path") from error
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
