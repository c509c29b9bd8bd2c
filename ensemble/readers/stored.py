"""Read one image file: the stored numbers and their grid. The only module that opens image files.

No value is replaced: NaN stays NaN, so that the checks of values see it.
"""

from __future__ import annotations

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
from ensemble.files import cannot_open_error, open_file
from ensemble.geometry import Grid
from ensemble.logging_setup import redirect_native_stderr
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.readers.content import refuse_mislabelled_file
from ensemble.readers.geometry_checks import last_itk_line
from ensemble.readers.integrity import (
    DAMAGE,
    check_file_integrity,
    damaged_file_error,
    refuse_too_large,
    unreadable_file_error,
    unusable_header_error,
)
from ensemble.readers.names import IMAGE_SUFFIXES, image_suffix
from ensemble.readers.nifti import NiftiHeader, read_nifti_header
from ensemble.types import AnyArray, FloatArray

#: What reads each kind: left to choose by content, ITK would take a TIFF or an HDF5 file that is named .mha, with a geometry made up.
_READERS = {
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".nii", ".nii.gz"), "NiftiImageIO"),
}
#: Formats with header and data in one file.
_SINGLE_FILE = (".mha", ".nii", ".nii.gz", ".nrrd")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """The voxels of a file as stored, with three or four axes, before any rescale."""

    array: AnyArray
    """As stored: ([volume,] z, y, x), not yet scaled."""
    grid: Grid
    """Of each volume."""
    scale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept of the stored values."""
    remarks: tuple[str, ...] = ()
    """What is odd about the file, one sentence each."""

    def values(self, kind: type[np.floating]) -> FloatArray:
        """Return the values; infinite if too large for the number type."""
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
        header = read_nifti_header(path)
        if header is not None:
            return _read_nifti(header, label)
        refuse_mislabelled_file(path, label)
        remarks = check_file_integrity(path, label)
    except (*DAMAGE, MemoryError) as error:
        raise _refusal(path, label, error) from error
    try:
        with _plain_name(path) as plain, redirect_native_stderr():
            grid = _grid(plain, path, label)
            image = sitk.ReadImage(str(plain), imageIO=_READERS[image_suffix(plain)])
            return StoredImage(sitk.GetArrayFromImage(image), grid, remarks=remarks)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise _refused_by_itk(path, label, error) from error


def read_grid(path: Path, label: str) -> Grid:
    """Return the grid of an image from its header alone. Raises InputRefused for headers that `read_stored` refuses."""
    _refuse_unreadable(path, label)
    try:
        header = read_nifti_header(path)
        if header is not None:
            return _nifti_grid(header, label, [])
        refuse_mislabelled_file(path, label)
        with _plain_name(path) as plain, redirect_native_stderr():
            return _grid(plain, path, label)
    except (*DAMAGE, MemoryError) as error:
        raise _refusal(path, label, error) from error
    except (RuntimeError, OverflowError) as error:
        raise _refused_by_itk(path, label, error) from error


def _refusal(path: Path, label: str, error: Exception) -> InputRefused:
    """Return the error for a file that could not be read to its end, because of memory, the disk, or its contents."""
    if is_out_of_memory(error):
        return out_of_memory_error(path, label)
    if isinstance(error, OSError) and error.errno is not None:
        return cannot_open_error(f"the {label} image", path, error)
    return damaged_file_error(path, label, str(error) or type(error).__name__)


def out_of_memory_error(path: Path, label: str) -> InputRefused:
    """Return the error for an image that does not fit into memory, damaged or not."""
    do = f"{MORE_MEMORY}; or give only the volume of b about 1000 s/mm^2, cropped to the head"
    return InputRefused(f"there is not enough memory to read the {label} image", where=path, do=do)


def _read_nifti(header: NiftiHeader, label: str) -> StoredImage:
    remarks: list[str] = []
    grid = _nifti_grid(header, label, remarks)
    return StoredImage(header.voxels(), grid, header.scale, tuple(f"{label}: {remark}" for remark in remarks))


def _nifti_grid(header: NiftiHeader, label: str, remarks: list[str]) -> Grid:
    """Return the grid of a NIfTI image, adding oddities to `remarks`. Raises InputRefused for an invalid header."""
    if found := header.fault(remarks):
        raise unusable_header_error(header.path, label, found)
    if found := header.shortfall():
        raise damaged_file_error(header.path, label, found)
    refuse_too_large(header.size, header.path, label)
    if header.not_scalar:
        raise _not_scalar(header.path, label, header.not_scalar)
    header.refuse_decompression_bomb(label)
    try:
        with header.place_for_itk() as plain, redirect_native_stderr():
            grid = _grid(plain, header.path, label)
            grid = replace(grid, direction=header.direction() or grid.direction)
    except (RuntimeError, struct.error) as error:
        raise _refused_by_itk(header.path, label, error) from error
    if not header.size[:3] == grid.size or len(header.size) > 4:
        raise not_3d_error(header.path, label, header.size)
    lengths = None if header.sform is None else np.linalg.norm(np.reshape(header.sform, (3, 4))[:, :3], axis=0)
    if lengths is not None and np.allclose(lengths, grid.spacing_mm, rtol=1e-3):  # not where its unit is other than mm
        grid = replace(grid, sform=header.sform)
    return grid


def _grid(plain: Path, path: Path, label: str) -> Grid:
    """Return the grid of the file's first three axes as ITK reads it. Raises InputRefused unless scalar with three or four axes."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[image_suffix(plain)])
    reader.SetFileName(str(plain))
    reader.ReadImageInformation()
    size, axes = reader.GetSize(), reader.GetDimension()
    # before allocating the memory that a damaged header may claim
    refuse_too_large((*size, reader.GetNumberOfComponents()), path, label)
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise _not_scalar(path, label, f"{reader.GetNumberOfComponents()} components of {kind}")
    if axes not in (3, 4):
        raise not_3d_error(path, label, size)
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3] + 0.0  # without negative zeros
    x, y, z = reader.GetSpacing()[:3]
    left, posterior, superior = (mm + 0.0 for mm in reader.GetOrigin()[:3])
    return Grid(size[:3], (x, y, z), (left, posterior, superior), tuple(direction.ravel().tolist()))


def not_3d_error(path: Path, label: str, size: tuple[int, ...]) -> InputRefused:
    """Return the error for an image with too few axes, or several volumes where one is expected."""
    return InputRefused(
        f"the {label} image is not 3-D", where=path, found=f"size {_by(size)}", do="give one 3-D volume"
    )


def _not_scalar(path: Path, label: str, found: str) -> InputRefused:
    return InputRefused(
        f"the {label} image is not scalar", where=path, found=found, do="give an image with one grey value per voxel"
    )


def _refused_by_itk(path: Path, label: str, error: Exception) -> InputRefused:
    if is_out_of_memory(error):
        return out_of_memory_error(path, label)
    return unreadable_file_error(path, label, last_itk_line(error))


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _refuse_unreadable(path: Path, label: str) -> None:
    """Raise the error for a file that can't be opened."""
    kinds = ", ".join(IMAGE_SUFFIXES)
    try:
        with open_file(path) as file:
            first = file.read(1)
    except OSError as error:
        raise cannot_open_error(f"the {label} image", path, error) from error
    if not first:
        raise InputRefused(f"the {label} image is an empty file", where=path, do="copy or export it again")
    if not image_suffix(path):
        raise InputRefused(
            f"the {label} file has an unsupported format",
            where=path,
            found=f"a name that ends in {path.suffix}" if path.suffix else "a name without a suffix",
            do=f"convert it to one of: {kinds}",
        )


@contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """Yield a path to the file that ITK accepts: with a lower-case suffix and valid UTF-8."""
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
