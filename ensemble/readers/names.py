"""What the names of image files tell. Imports no image library."""

from __future__ import annotations

from pathlib import Path

#: Kinds of image that are read, by the file name's ending in lower case. Of these a truncated file is known to be noticed.
IMAGE_SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr")
#: Kind of file that may hold DICOM slices, and the endings of single ones; those without are known by their first bytes.
ARCHIVE, SLICE_SUFFIXES = ".zip", (".dcm", ".ima")


def image_suffix(path: Path) -> str:
    """The ending, in lower case, that tells which kind of image a file is; empty when it is none that we read."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), "")


def stem(path: Path) -> str:
    """File name without the image ending: `a.nii.gz` -> `a`."""
    ending = image_suffix(path) or path.suffix
    return path.name[: -len(ending)] if ending else path.name
