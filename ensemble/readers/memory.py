"""Read images held in memory, in files, or both, into a RawCase. Each is checked as a file would be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused, UsageError
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.geometry_checks import orthonormalize_direction
from ensemble.readers.imagefile import case_name, read_case_files, read_image
from ensemble.readers.integrity import refuse_too_large
from ensemble.types import Modality
from ensemble.volume import Volume, from_sitk

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

#: What can be read: a path, or an image in memory.
ImageLike: TypeAlias = str | os.PathLike[str] | Volume | nib.spatialimages.SpatialImage | sitk.Image


def read_images(given: Mapping[Modality, ImageLike], name: str | None = None) -> RawCase:
    """Read one image per modality. `name` is the case's name; by default that of the DWI's file, or "case" if there is none.

    Raises InputRefused when an image can't be read safely, UsageError when its type is not supported.
    """
    files = {modality: Path(image) for modality, image in given.items() if isinstance(image, str | os.PathLike)}
    dwi = files.get(Modality.DWI)
    case = read_case_files(name or (case_name(dwi) if dwi else "case"), files, adc_is_held=Modality.ADC in given)
    images = {
        **case.images,
        **{modality: _read(image, modality) for modality, image in given.items() if modality not in files},
    }
    return replace(case, images={modality: images[modality] for modality in Modality if modality in images})


def _read(image: ImageLike, modality: Modality) -> RawImage:
    """Read an image in memory. Errors name the modality, because there is no file."""
    for kind, called, reader in _READERS:
        if isinstance(image, kind):
            source = Path(f"{modality.label} given as {called}")
            try:
                return reader(image, modality, source)
            except InputRefused as refused:
                refused.where = str(source)
                raise
    raise UsageError(
        f"the {modality.label} image is neither a path nor an image",
        found=f"an object of type {type(image).__module__}.{type(image).__qualname__}",
        do="give a path, a nibabel or SimpleITK image, or a Volume; for an array, use Volume.from_numpy(array, affine)",
    )


def _of_volume(volume: Volume, modality: Modality, source: Path) -> RawImage:
    refuse_too_large(volume.grid.size, source, modality.label)
    if min(volume.grid.size) < 2:
        raise InputRefused(
            f"the {modality.label} image is a single slice",
            where=source,
            found=f"size {' x '.join(map(str, volume.grid.size))}",
            do="give the whole volume",
        )
    notes: list[str] = []
    grid = orthonormalize_direction(volume.grid, source, modality.label, notes)
    with np.errstate(over="ignore"):
        array = volume.array.astype(np.float32)
    return RawImage(source, Volume(array, grid), tuple(notes))


def _of_sitk(image: sitk.Image, modality: Modality, source: Path) -> RawImage:
    scalar = image.GetNumberOfComponentsPerPixel() == 1 and "complex" not in image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or not scalar:
        raise InputRefused(
            f"the {modality.label} image is not one 3-D volume of grey values",
            where=source,
            found=f"{image.GetDimension()} axes, voxels of {image.GetNumberOfComponentsPerPixel()} x {image.GetPixelIDTypeAsString()}",
            do="give one 3-D volume with one number per voxel",
        )
    return _of_volume(from_sitk(image), modality, source)


def _of_nibabel(image: SpatialImage, modality: Modality, source: Path) -> RawImage:
    """Convert a NIfTI image through the file reader, which checks the whole header; other images by their affine."""
    try:
        voxels = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError) as error:
        raise InputRefused(
            f"the voxels of the {modality.label} image can't be read",
            where=source,
            found=f"{image.get_filename() or 'in memory'}: {error}",
            do="copy or export it again",
        ) from error
    if not isinstance(image, nib.Nifti1Pair) or voxels.dtype.kind not in "buif":
        return _of_volume(Volume.from_numpy(voxels, image.affine), modality, source)
    with np.errstate(over="ignore"):
        voxels = voxels.astype(np.float32)
    kind = nib.Nifti2Image if isinstance(image, nib.Nifti2Image) else nib.Nifti1Image
    with tempfile.TemporaryDirectory() as folder:
        header = image.header.copy()
        header.set_data_dtype(np.float32)
        header.set_slope_inter(1, 0)
        nib.save(kind(voxels, image.affine, header), path := Path(folder) / "image.nii")
        return replace(read_image(path, modality), path=source)


_READERS: tuple[tuple[type[Any], str, Callable[[Any, Modality, Path], RawImage]], ...] = (
    (Volume, "a Volume", _of_volume),
    (sitk.Image, "a SimpleITK image", _of_sitk),
    (nib.spatialimages.SpatialImage, "a nibabel image", _of_nibabel),
)
