"""What ITK passes over in silence: truncated data that it fills up, and header fields that it replaces by guesses.

Field offsets: NIfTI-1 and NIfTI-2 (nifti.nimh.nih.gov), MetaImage (itk.org/Wiki/MetaIO).
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from ensemble.errors import InputRefused
from ensemble.readers.headers import TextHeader, text_header
from ensemble.streams import printable
from ensemble.types import AnyArray

_DAMAGE = (EOFError, OSError, zlib.error, struct.error, ValueError, OverflowError)
_METAIMAGE_NUMBERS = (
    *("ElementSpacing", "ElementSize", "Offset", "Position", "Origin"),
    *("TransformMatrix", "Rotation", "Orientation"),
)
#: Where a text header says how its axes lie: MetaImage's three words for it, and NRRD's (its directions mean nothing without a space).
_ORIENTATIONS = ("TransformMatrix", "Rotation", "Orientation", "space")
#: The size of one axis in an NRRD header, a number or a vector; and the kinds that are axes of an image.
_NRRD_SIZE = re.compile(r"\([^)]*\)|[^\s()]+")
_NRRD_AXES = ("domain", "space", "time", "???", "none")
#: What names several data files (a list that follows, a pattern), by the headers that may name one; others may name none.
_SEVERAL_FILES = {".mhd": re.compile(r"LIST|.*%"), ".nhdr": re.compile(r"LIST|.*%\d*d")}
#: Bytes of a MetaImage's elements; long ones are read as of 4 bytes.
_ELEMENT_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_ELEMENT_TYPE = re.compile(r"MET_(?:U|ASCII_)?(\w+)")


@dataclass(frozen=True)
class _NiftiLayout:
    """Where a NIfTI header's fields lie, as struct formats and byte offsets."""

    bytes: int
    dim: tuple[str, int]
    bitpix: tuple[str, int]
    pixdim: tuple[str, int]
    vox_offset: tuple[str, int]
    qform_code: tuple[str, int]
    sform_code: tuple[str, int]
    quaternion: tuple[str, int]
    """b, c, d, and the position of the first voxel."""
    srow: tuple[str, int]


#: By the header's own first number, its size.
_NIFTI = {
    348: _NiftiLayout(
        348, ("8h", 40), ("h", 72), ("8f", 76), ("f", 108), ("h", 252), ("h", 254), ("6f", 256), ("12f", 280)
    ),
    540: _NiftiLayout(
        540, ("8q", 16), ("h", 14), ("8d", 104), ("q", 168), ("i", 344), ("i", 348), ("6d", 352), ("12d", 400)
    ),
}
#: The two places that a NIfTI header may name must agree to this, in voxels: viewers differ in which one they take.
_MOST_APART_VOXELS = 0.5
#: Deviation of a matrix's columns from right angles (as cosines), and of their lengths from the voxel size (as share).
_SKEW, _STRETCH = 1e-3, 0.01
#: A compressed file may hold this much more than its header says (extensions, padding); beyond, it is not what it says.
_MOST_SURPLUS = 1 << 28


def remarks_or_refusal(path: Path, label: str) -> tuple[str, ...]:
    """What is odd about a file, one sentence each, as far as ITK would not say so.

    Raises InputRefused where data are cut off or lie in files that nobody would look after, or a header holds what can't be.
    """
    name = path.name.lower()
    remarks: list[str] = []
    try:
        found = ""
        if name.endswith((".nii", ".nii.gz")):
            found = _nifti_damage(path, remarks, compressed=name.endswith(".gz"))
        elif (header := text_header(path)) is not None:
            _refuse_scattered(header, path, label)
            _refuse_without_voxel_size(header, path, label)
            if not any(key in header.fields for key in _ORIENTATIONS):
                remarks.append("its header says nothing of orientation: axes taken as they are stored")
            found = (_metaimage_damage if name.endswith((".mha", ".mhd")) else _nrrd_damage)(header, path)
    except _DAMAGE as error:
        found = str(error) or type(error).__name__
    if found:
        raise InputRefused(
            f"the {label} image is damaged or truncated",
            where=path,
            found=printable(found),
            do="copy or export it again",
        )
    return tuple(f"{label}: {remark}" for remark in remarks)


def _refuse_scattered(header: TextHeader, path: Path, label: str) -> None:
    """Raise InputRefused for voxels in other files than `source_files` tells of: should one change, nobody would notice."""
    several = _SEVERAL_FILES.get(path.suffix.lower())
    if header.data_file and (several is None or several.match(header.data_file)):
        raise InputRefused(
            f"the {label} image's voxels lie in other files, which is read only of an .mhd or .nhdr with one of them",
            where=path,
            found=printable(header.data_file[:80]),
            do="convert it to a single .mha, .nrrd or .nii.gz",
        )


def _refuse_without_voxel_size(header: TextHeader, path: Path, label: str) -> None:
    """Raise InputRefused for a MetaImage or NRRD header that tells no size of the first three axes: ITK takes 1 mm."""
    fields = header.fields
    if path.suffix.lower() in (".mha", ".mhd"):
        key, axes = "ElementSpacing", int(fields.get("NDims", 3))
        sizes = fields.get(key, fields.get("ElementSize", "")).split()
    else:
        key = "spacedirections" if "spacedirections" in fields else "spacings"
        sizes = _NRRD_SIZE.findall(fields.get(key, ""))
        # what ITK takes for components of a voxel are no axes
        components = [kind not in _NRRD_AXES for kind in fields.get("kinds", "").split()]
        sizes = [size for n, size in enumerate(sizes) if not any(components[n : n + 1])]
        axes = int(fields.get("dimension", 3)) - sum(components)
    if len(sizes) < min(axes, 3) or not all(_is_size(size) for size in sizes[:3]):
        raise InputRefused(
            f"the {label} image's header does not say how large its voxels are",
            where=path,
            found=printable(f"{key}: {fields[key]}") if key in fields else f"no {key}",
            do="export it again, with its geometry",
        )


def _is_size(text: str) -> bool:
    """Whether a number, or a vector's numbers, are finite and not all 0; NRRD's `none` is no size."""
    numbers = [math.nan if text == "none" else float(number) for number in text.strip("()").split(",")]
    return all(map(math.isfinite, numbers)) and any(numbers)


def _nifti_damage(path: Path, remarks: list[str], *, compressed: bool) -> str:
    """What is wrong with a NIfTI file; empty when nothing is, or when ITK will refuse it anyway. Adds what is only odd to `remarks`."""
    with cast(BinaryIO, gzip.open(path)) if compressed else path.open("rb") as file:
        header = file.read(540)
        for order in "<>":
            layout = _NIFTI.get(struct.unpack_from(order + "i", header)[0])
            if layout is not None:
                break
        else:
            return ""

        def read(field: tuple[str, int]) -> Sequence[float]:
            return struct.unpack_from(order + field[0], header, field[1])

        dim, pixdim, offset = read(layout.dim), read(layout.pixdim), read(layout.vox_offset)[0]
        axes = int(dim[0])
        if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
            return f"dimensions {list(dim)}"
        if not all(math.isfinite(mm) and mm > 0 for mm in pixdim[1 : min(axes, 3) + 1]):
            return f"voxel size {list(pixdim[1:4])}"
        if read(layout.sform_code)[0] > 0 and not all(map(math.isfinite, read(layout.srow))):
            return "an orientation that is not a number"
        sform = np.reshape(read(layout.srow), (3, 4)) if read(layout.sform_code)[0] > 0 else None
        qform = _quaternion_affine(read(layout.quaternion), pixdim) if read(layout.qform_code)[0] > 0 else None
        if axes >= 3 and (found := _misplaced(sform, qform, [int(n) for n in dim[1:4]], pixdim[1:4], remarks)):
            return found
        if not math.isfinite(offset) or offset < layout.bytes + 4:
            return f"data that begin at byte {offset}, inside the header"
        needed = int(offset) + math.prod(int(n) for n in dim[1 : axes + 1]) * int(read(layout.bitpix)[0]) // 8
        present = len(header)
        while (
            block := file.read(1 << 20)
        ) and present < needed + _MOST_SURPLUS:  # to the end, where gzip's checksum stands
            present += len(block)
    if present >= needed + _MOST_SURPLUS:
        return f"more than {present} bytes, where the header tells of {needed}"
    return f"{present} bytes of {needed} (uncompressed)" if present < needed else ""


def _misplaced(
    sform: AnyArray | None, qform: AnyArray | None, size: list[int], voxel_mm: Sequence[float], remarks: list[str]
) -> str:
    """What is wrong with the place that a NIfTI header names: ITK takes the qform, silently, where the sform does not suit it."""
    if sform is None and qform is None:
        remarks.append(
            "its header says nothing of place and orientation (NIfTI codes 0): axes taken as they are stored"
        )
        return ""
    if sform is None:
        return ""
    lengths = np.linalg.norm(sform[:, :3], axis=0)
    if not (lengths > 0).all():
        return "an sform that flattens the image"
    unit = sform[:, :3] / lengths
    if np.abs(unit.T @ unit - np.eye(3)).max() > _SKEW:
        return "an sform whose axes are not at right angles (sheared): resample the image to straight axes"
    if np.abs(lengths / np.asarray(voxel_mm) - 1).max() > _STRETCH:
        return f"voxels of {lengths.round(4).tolist()} mm by the sform, {list(voxel_mm)} mm by pixdim"
    if qform is None:
        return ""
    ends = np.array([(x, y, z, 1) for x in (0, size[0] - 1) for y in (0, size[1] - 1) for z in (0, size[2] - 1)])
    apart = float((np.linalg.norm((sform - qform) @ ends.T, axis=0)).max() / min(voxel_mm))
    if not apart <= _MOST_APART_VOXELS:
        return f"two places, sform and qform, {apart:.3g} voxels apart: write the right one to both"
    return ""


def _quaternion_affine(quaternion: Sequence[float], pixdim: Sequence[float]) -> AnyArray:
    """The 3x4 matrix of a NIfTI qform (method 2 of nifti1.h)."""
    b, c, d, *offset = quaternion
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    b, c, d = (number / max(1.0, math.sqrt(b * b + c * c + d * d)) for number in (b, c, d))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    flip = -1.0 if pixdim[0] < 0 else 1.0
    return np.column_stack([rotation * np.array([pixdim[1], pixdim[2], pixdim[3] * flip]), offset])


def _metaimage_damage(header: TextHeader, path: Path) -> str:
    """What is wrong with a MetaImage file; empty when nothing is, or when ITK will refuse it anyway."""
    for key in _METAIMAGE_NUMBERS:
        numbers = [float(number) for number in header.fields.get(key, "").split()]
        positive = key in ("ElementSpacing", "ElementSize")
        if not all(math.isfinite(number) and (number > 0 or not positive) for number in numbers):
            return f"{key} = {header.fields[key]}"
    return _metaimage_data_damage(header, path)


def _metaimage_data_damage(header: TextHeader, path: Path) -> str:
    """What is missing of a MetaImage's voxels, or wrong with their compression: ITK ignores zlib's errors, and so its checksum."""
    fields = header.fields
    kind = _ELEMENT_TYPE.fullmatch(fields.get("ElementType", ""))
    size = [int(number) for number in fields.get("DimSize", "").split()]
    if kind is None or kind[1] not in _ELEMENT_BYTES or not size or min(size) < 1 or not _true(fields, "BinaryData"):
        return ""
    needed = math.prod(size) * _ELEMENT_BYTES[kind[1]] * int(fields.get("ElementNumberOfChannels", 1))
    skipped = int(fields.get("HeaderSize", 0))
    source, start = header.voxels_of(path)
    start = skipped if skipped > 0 else start
    with source.open("rb") as file:
        present = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        if not _true(fields, "CompressedData"):
            return f"{present} bytes of {needed}" if present < needed else ""
        stated = int(fields.get("CompressedDataSize", 0))
        if stated <= 0 and start > 0:
            return "no CompressedDataSize, without which ITK takes the header for voxels"
        if present < stated:
            return f"{present} bytes of {stated} (compressed)"
        return _deflated_damage(file, stated if stated > 0 else present, needed)


def _deflated_damage(file: BinaryIO, left: int, needed: int) -> str:
    """What is wrong with so many bytes of a zlib or gzip stream. Raises zlib.error, also where its checksum does not hold."""
    stream, given = zlib.decompressobj(wbits=47), 0
    while not stream.eof and given <= needed and (block := file.read(min(left, 1 << 16))):
        left -= len(block)
        given += len(stream.decompress(block))
    if given != needed:
        return f"{given} bytes of {needed} (uncompressed)"
    return "" if stream.eof else "a compressed stream without its end"


def _nrrd_damage(header: TextHeader, path: Path) -> str:
    """What is wrong with an NRRD file's compressed voxels: ITK counts them, but does not always read on to their checksum."""
    if header.fields.get("encoding", "").lower() not in ("gz", "gzip"):
        return ""
    most = math.prod(int(number) for number in header.fields.get("sizes", "").split()) * 8 + _MOST_SURPLUS
    source, start = header.voxels_of(path)
    with source.open("rb") as file:
        file.seek(start)
        for _ in range(int(header.fields.get("lineskip", 0))):
            file.readline()
        given = 0
        with gzip.open(file) as voxels:
            while given < most and (block := voxels.read(1 << 20)):
                given += len(block)
    return f"more than {given} bytes of voxels" if given >= most else ""


def _true(fields: Mapping[str, str], key: str) -> bool:
    """As ITK takes it: MetaImages are binary, and not compressed, unless they say so."""
    return fields.get(key, "True" if key == "BinaryData" else "False")[:1] in ("T", "t", "1")
