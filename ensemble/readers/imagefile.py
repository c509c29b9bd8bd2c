"""One image file -> RawImage, refusing what would otherwise be read wrongly and silently."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.dicom.read import Examination, is_dicom, opened, read_dicom
from ensemble.readers.integrity import remarks_or_refusal
from ensemble.readers.names import IMAGE_SUFFIXES, image_suffix, stem
from ensemble.readers.native import MOST_VOXELS, last_line, straightened
from ensemble.readers.volumes import diffusion_weighted
from ensemble.streams import native_stderr_to_log
from ensemble.types import Modality
from ensemble.volume import Volume, from_sitk

#: Kinds whose data lie in the same file as the header.
_SINGLE_FILE = (".mha", ".nii", ".nii.gz", ".nrrd")
#: File names that say what an image shows, not whose it is.
_GENERIC = {"dwi", "b1000", "dwi_b1000", "trace", "diffusion", "image"}


def read_case(name: str, files: Mapping[Modality, Path]) -> RawCase:
    """Read one file, DICOM folder or archive a modality. Raises InputRefused naming the first that can't be read."""
    started = time.perf_counter()
    for path in files.values():
        # one folder or archive may hold several series; one file is one image
        if not is_dicom(path) and sum(other == path for other in files.values()) > 1:
            raise InputRefused("one file is given for two modalities", where=path, do="give each image its own file")
    images: dict[Modality, RawImage] = {}
    with ExitStack() as open_ones:
        examinations: dict[Path, Examination] = {}  # headers of one folder are read once, whatever is taken of it
        for modality, path in files.items():
            if is_dicom(path):
                if path not in examinations:
                    examinations[path] = open_ones.enter_context(opened(path, modality.value.upper()))
                images[modality] = examinations[path].read(modality)
            else:
                images[modality] = read_image(path, modality)
    return RawCase(name, images, time.perf_counter() - started)


def read_image(path: Path, modality: Modality) -> RawImage:
    """Read a whole 3-D scalar image as float32; of a 4-D file the one volume, or of a DWI the diffusion-weighted one.

    Raises InputRefused when the file is missing, of a kind that is not read, truncated or damaged, not 3-D and scalar, or when its
    header names no place in the world. A folder or .zip is read as DICOM.
    """
    label = modality.value.upper()
    if is_dicom(path):
        return read_dicom(path, modality)
    _refuse_unreadable(path, label)
    notes = list(remarks_or_refusal(path, label))
    try:
        with _plain_name(path) as plain, native_stderr_to_log():
            _refuse_too_large(plain, path, label)
            image = _single_volume(sitk.ReadImage(str(plain)), path, modality, notes)
            volume = from_sitk(sitk.Cast(image, sitk.sitkFloat32))
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise InputRefused(
            f"the {label} file is not a readable image, or is damaged",
            where=path,
            found=last_line(error),
            do="open it in a viewer to see whether it is whole; copy or export it again",
        ) from error
    grid = straightened(volume.grid, path, label, notes)
    return RawImage(path, Volume(volume.array, grid), tuple(notes))


def case_name(dwi: Path) -> str:
    """What to call a case: the DWI's file name without its ending, or its folder's where the file's is only "dwi"."""
    name, folder = stem(dwi), dwi.absolute().parent.name
    return folder if name.lower() in _GENERIC and folder else name


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


def _refuse_too_large(plain: Path, path: Path, label: str) -> None:
    """Raise InputRefused before memory is asked for that a damaged header claims to need."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(plain))
    reader.ReadImageInformation()
    size = reader.GetSize()
    voxels = math.prod(size) * reader.GetNumberOfComponents()
    if voxels > MOST_VOXELS:
        raise InputRefused(
            f"the {label} image is too large to be a brain scan",
            where=path,
            found=f"size {' x '.join(map(str, size))}",
            do="check the header; crop or resample it if it is right",
        )


def _single_volume(image: sitk.Image, path: Path, modality: Modality, notes: list[str]) -> sitk.Image:
    label = modality.value.upper()
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise InputRefused(
            f"the {label} image is not scalar",
            where=path,
            found=f"{image.GetNumberOfComponentsPerPixel()} components of {image.GetPixelIDTypeAsString()}",
            do="give one grey value a voxel",
        )
    size = " x ".join(map(str, image.GetSize()))
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    elif image.GetDimension() == 4 and modality is Modality.DWI:
        first = image[:, :, :, 0]
        b_file = path.with_name(stem(path) + ".bval")
        b_values = _b_values(b_file, image.GetSize()[3])
        chosen, note = diffusion_weighted(sitk.GetArrayViewFromImage(image), b_values, path, b_file.name)
        notes.append(note)
        volume = sitk.GetImageFromArray(chosen)
        volume.CopyInformation(first)
        image = volume
    if image.GetDimension() != 3:
        raise InputRefused(f"the {label} image is not 3-D", where=path, found=f"size {size}", do="give one 3-D volume")
    if min(image.GetSize()) < 2:
        raise InputRefused(
            f"the {label} image is a single slice", where=path, found=f"size {size}", do="give the whole volume"
        )
    return image


def _b_values(beside: Path, volumes: int) -> Sequence[float] | None:
    """The b-values in the .bval file beside an image (FSL's format), None when there is no such file."""
    if not beside.is_file():
        return None
    try:
        b_values = [float(text) for text in beside.read_text(encoding="ascii").split()]
        problem = "" if len(b_values) == volumes else f"{len(b_values)} numbers for {volumes} volumes"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem or not all(math.isfinite(b) and b >= 0 for b in b_values):
        raise InputRefused(
            "the DWI's file of b-values can't be understood",
            where=beside,
            found=problem or beside.name,
            do="give one b-value (s/mm^2) a volume, in one line",
        )
    return b_values


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
