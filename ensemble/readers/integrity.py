"""Find damage that ITK silently ignores in files with text headers: truncated data, and invalid fields replaced by guesses.

Fields: MetaImage (itk.org/Wiki/MetaIO), NRRD (teem.sourceforge.net/nrrd/format.html).
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ensemble.errors import InputRefused
from ensemble.files import open_file, refuse_irregular_file, unreadable_reason
from ensemble.geometry import MAX_VOXELS
from ensemble.readers.headers import TEXT_HEADERS, TextHeader, read_text_header
from ensemble.readers.inflate import GzipReader
from ensemble.text import replace_undecodable

#: What reading damaged files raises.
DAMAGE = (EOFError, OSError, zlib.error, struct.error, ValueError, OverflowError)
_METAIMAGE_NUMBERS = (
    *("ElementSpacing", "ElementSize", "Offset", "Position", "Origin"),
    *("TransformMatrix", "Rotation", "Orientation"),
)
#: Header keys of the orientation: three of MetaImage, and NRRD's `space`, without which its directions are meaningless; and the spaces
#: that name anatomical axes.
_ORIENTATIONS = ("TransformMatrix", "Rotation", "Orientation", "space")
_ANATOMICAL = re.compile(r"(right|left)-(anterior|posterior)-(superior|inferior)(-time)?|[rl][ap][si]t?", re.IGNORECASE)
#: Keys of MetaImage that say the same: programs differ in the one they use.
_SYNONYMS = (
    ("Offset", "Position", "Origin"),
    ("TransformMatrix", "Rotation", "Orientation"),
    ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
)
#: The size of one axis in an NRRD header, a number or a vector; and the kinds that are axes of an image.
_NRRD_SIZE = re.compile(r"\([^)]*\)|[^\s()]+")
_NRRD_AXES = ("domain", "space", "time", "???", "none")
#: What names several data files (a list that follows, a pattern), by the headers that may name one; others may name none.
_SEVERAL_FILES = {".mhd": re.compile(r"LIST|.*%"), ".nhdr": re.compile(r"LIST|.*%\d*d")}
#: Bytes of a MetaImage's elements; long ones are read as of 4 bytes.
_ELEMENT_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
#: Bytes of an NRRD's voxels, by names of types without "unsigned" and "int"; others are short ones.
_NRRD_BYTES = {"double": 8, "float": 4, "int": 4, "short": 2, "long long": 8, "longlong": 8}
_NRRD_BYTES |= {f"{sign}int{bits}{end}": bits // 8 for sign in ("", "u") for bits in (16, 32, 64) for end in ("", "_t")}
#: Of the axes that MetaIO has room for.
_MAX_AXES = 10
_ELEMENT_TYPE = re.compile(r"MET_(?:U|ASCII_)?(\w+)")


#: A compressed file may hold this much more than its header states (extensions, padding); with more, the header is wrong.
MAX_SURPLUS = 1 << 28
#: Deflate inflates a byte to at most 1032 (zlib's technical details); more data than that can't be in the file. A scan inflates to 2 to 100
#: times its size, and a mask to more. Above the second ratio, data beyond the third size are refused: they would take gigabytes of memory.
MAX_INFLATION, _MAX_SCAN_INFLATION, _FREE_BYTES = 1032, 200, 256 << 20
#: Most header lines of an NRRD file.
_MAX_LINES = 1 << 16


def check_file_integrity(path: Path, label: str) -> tuple[str, ...]:
    """Return remarks on unusual things in a file that ITK would not report, one sentence each.

    Raises InputRefused if data are truncated or in unchecked files, or if the header has impossible values; OSError if the file can't be
    read.
    """
    remarks: list[str] = []
    try:
        found = ""
        header = read_text_header(path)
        if header is None and path.suffix.lower() in TEXT_HEADERS:
            raise unreadable_file_error(path, label, "no MetaImage or NRRD header")
        if header is not None:
            if header.oddity:
                raise unusable_header_error(path, label, header.oddity)
            _refuse_scattered(header, path, label)
            metaimage = path.suffix.lower() in (".mha", ".mhd")
            if odd := _odd_numbers(header, metaimage=metaimage):
                raise unusable_header_error(path, label, odd)
            _refuse_without_voxel_size(header, path, label)
            space = header.fields.get("space", "")
            if not any(key in header.fields for key in _ORIENTATIONS) or (space and not _ANATOMICAL.fullmatch(space)):
                remarks.append("its header has no orientation: axes used as stored")
            size = tuple(map(int, header.fields.get("DimSize" if metaimage else "sizes", "").split()))
            if header.fields.get("encoding", "raw").lower() != "raw" or _true(header.fields, "CompressedData"):
                refuse_too_large(size, path, label)  # before all of it is inflated to see whether it is whole
                source, start = header.voxels_of(path)
                refuse_decompression_bomb(
                    math.prod(size) * _voxel_bytes(header), source.stat().st_size - start, path, label
                )
            found = (_metaimage_data_damage if metaimage else _nrrd_damage)(header, path)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        found = str(error) or type(error).__name__
    if found:
        raise damaged_file_error(path, label, found)
    return tuple(f"{label}: {remark}" for remark in remarks)


def damaged_file_error(path: Path, label: str, found: str) -> InputRefused:
    """Return the error for an image file that is damaged or truncated."""
    return InputRefused(
        f"the {label} image is damaged or truncated",
        where=path,
        found=replace_undecodable(found),
        do="copy or export it again",
    )


def unusable_header_error(path: Path, label: str, found: str) -> InputRefused:
    """Return the error for a file, possibly complete, whose header is impossible or not supported."""
    return InputRefused(
        f"the {label} image's header can't be used",
        where=path,
        found=replace_undecodable(found),
        do="export or convert it again with a tool that writes this field correctly",
    )


def refuse_too_large(size: tuple[int, ...], path: Path, label: str) -> None:
    """Raise InputRefused for more voxels than any brain scan has."""
    if math.prod(size) > MAX_VOXELS:
        raise InputRefused(
            f"the {label} image is too large to be a brain scan",
            where=path,
            found=f"size {' x '.join(map(str, size))}; at most {MAX_VOXELS / 1e6:g} million voxels are allowed",
            do="correct the header; if it is right, crop or resample the image",
        )


def unreadable_file_error(path: Path, label: str, found: str) -> InputRefused:
    """Return the error for a file that is not an image of the format in its name."""
    return InputRefused(
        f"the {label} file is not a readable image, or is damaged",
        where=path,
        found=replace_undecodable(found),
        do="open it in a viewer: if it does not open, copy or export it again; if it has another format, convert it, since another suffix"
        " is not enough",
    )


def refuse_decompression_bomb(needed: int, present: int, path: Path, label: str) -> None:
    """Raise InputRefused if `present` bytes of compressed data inflate to `needed` bytes at a ratio that no scan reaches."""
    if present * MAX_INFLATION < needed:
        raise damaged_file_error(path, label, f"{present} bytes (compressed), which can't hold {needed}")
    if needed > _MAX_SCAN_INFLATION * present + _FREE_BYTES:
        raise InputRefused(
            f"the {label} image would inflate to {needed / present:.0f} times its size, which no scan does",
            where=path,
            found=f"{needed / 1e6:.0f} MB in {present / 1e6:.1f} MB; {_MAX_SCAN_INFLATION} times are allowed",
            do="check that it is not empty; export it again, cropped to the head or with fewer bytes per voxel",
        )


def _refuse_scattered(header: TextHeader, path: Path, label: str) -> None:
    """Raise InputRefused for voxels in other files than `source_files` tells of, or outside of the header's folder, or in no file: should
    one change, nobody would notice, and a header that came from elsewhere could show any file of this machine."""
    several = _SEVERAL_FILES.get(path.suffix.lower())
    if header.data_file and (several is None or several.match(header.data_file)):
        raise InputRefused(
            f"the {label} image's voxels are in other files, which is supported only for .mhd and .nhdr with a single data file",
            where=path,
            found=replace_undecodable(header.data_file[:80]),
            do="convert it to a single .mha, .nrrd or .nii.gz",
        )
    if header.data_file and header.leads_out:
        raise InputRefused(
            f"the {label} image's header refers to a file outside its folder",
            where=path,
            found=replace_undecodable(header.data_file[:200]),
            do="put the data file beside the header and name it without a path, or convert both to a single .mha, .nrrd or .nii.gz",
        )
    if header.data_file:
        data = path.parent / header.data_file
        try:
            refuse_irregular_file(data)
        except OSError as error:
            why = unreadable_reason(data, error)
            what = f"the file with the {label} image's voxels, which its header names, {why.what}"
            raise InputRefused(what, where=data, found=why.found, do=why.do) from error


def _refuse_without_voxel_size(header: TextHeader, path: Path, label: str) -> None:
    """Raise InputRefused for a MetaImage or NRRD header without the voxel size of three axes: ITK would assume 1 mm."""
    fields = header.fields
    if path.suffix.lower() in (".mha", ".mhd"):
        key, axes = "ElementSpacing", int(fields.get("NDims", 3))
        sizes = fields.get(key, fields.get("ElementSize", "")).split()
    else:
        key = "spacedirections" if "spacedirections" in fields else "spacings"
        sizes = _NRRD_SIZE.findall(fields.get(key, ""))
        # dimensions that ITK reads as components of a voxel are no axes
        components = [kind not in _NRRD_AXES for kind in fields.get("kinds", "").split()]
        sizes = [size for n, size in enumerate(sizes) if not any(components[n : n + 1])]
        axes = int(fields.get("dimension", 3)) - sum(components)
    if len(sizes) < min(axes, 3) or not all(_is_size(size) for size in sizes[:3]):
        raise InputRefused(
            f"the {label} image's header has no valid voxel size",
            where=path,
            found=replace_undecodable(f"{key}: {fields[key]}") if key in fields else f"no {key}",
            do="export it again with its voxel size",
        )


def _is_size(text: str) -> bool:
    """Return whether a number, or a vector of numbers, is finite and not all 0; NRRD's `none` is not a size."""
    numbers = [math.nan if text == "none" else float(number) for number in text.strip("()").split(",")]
    return all(map(math.isfinite, numbers)) and any(numbers)


def _odd_numbers(header: TextHeader, *, metaimage: bool) -> str:
    """Return the first header field with an impossible value; empty if there is none. Raises ValueError for invalid numbers."""
    key = "NDims" if metaimage else "dimension"
    axes = header.fields.get(key, "")
    if not axes.isdecimal() or not 0 < int(axes) <= _MAX_AXES:  # ITK allocates memory for all of them, and crashes
        return f"{key} = {axes}" if axes else f"no {key}"
    sizes = [int(number) for number in header.fields.get("DimSize" if metaimage else "sizes", "").split()]
    if any(size < 1 for size in sizes):
        return f"size {' x '.join(map(str, sizes))}"
    if metaimage:
        return _odd_metaimage_number(header)
    lines, skipped = (int(header.fields.get(key, 0)) for key in ("lineskip", "byteskip"))
    if not 0 <= lines <= _MAX_LINES:
        return f"line skip: {lines}"
    return "" if -1 <= skipped <= MAX_SURPLUS else f"byte skip: {skipped}"


def _odd_metaimage_number(header: TextHeader) -> str:
    """Return the first impossible number of a MetaImage header; empty if there is none, or if ITK refuses it anyway."""
    for key in _METAIMAGE_NUMBERS:
        numbers = [float(number) for number in header.fields.get(key, "").split()]
        positive = key in ("ElementSpacing", "ElementSize")
        if not all(math.isfinite(number) and (number > 0 or not positive) for number in numbers):
            return f"{key} = {header.fields[key]}"
    for keys in _SYNONYMS:
        told = {key: header.fields[key] for key in keys if key in header.fields}
        if len({tuple(_number_or_word(word) for word in text.split()) for text in told.values()}) > 1:
            return " but ".join(f"{key} = {text}" for key, text in told.items())
    for key, neutral in (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0)):
        if float(header.fields.get(key, neutral)) != neutral:
            return f"{key} = {header.fields[key]}, which is not supported: store the final values"
    return ""


def _number_or_word(text: str) -> float | str:
    """Return a number as such, and the first letter of a truth value, by which ITK reads it."""
    try:
        return float(text)
    except ValueError:
        return text[:1].upper()


def _metaimage_data_damage(header: TextHeader, path: Path) -> str:
    """Return what is missing or damaged in a MetaImage's voxels: ITK ignores zlib's errors, including checksums."""
    fields = header.fields
    kind = _ELEMENT_TYPE.fullmatch(fields.get("ElementType", ""))
    size = [int(number) for number in fields.get("DimSize", "").split()]
    if kind is None or kind[1] not in _ELEMENT_BYTES or not size or not _true(fields, "BinaryData"):
        return ""
    needed = math.prod(size) * _ELEMENT_BYTES[kind[1]] * int(fields.get("ElementNumberOfChannels", 1))
    skipped = int(fields.get("HeaderSize", 0))
    source, start = header.voxels_of(path)
    start = skipped if skipped > 0 else start
    with open_file(source) as file:
        present = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        if not _true(fields, "CompressedData"):
            return f"{present} bytes of {needed}" if present < needed else ""
        stated = int(fields.get("CompressedDataSize", 0))
        if stated <= 0 and start > 0:
            return "no CompressedDataSize, without which ITK would read the header as voxels"
        if present < stated:
            return f"{present} bytes of {stated} (compressed)"
        return _deflated_damage(file, stated if stated > 0 else present, needed)


def _deflated_damage(file: BinaryIO, left: int, needed: int) -> str:
    """Return the damage in a zlib or gzip stream that should inflate to so many bytes. Raises zlib.error, also for a wrong checksum."""
    stream, given = zlib.decompressobj(wbits=47), 0
    while not stream.eof and given <= needed and (block := file.read(min(left, 1 << 14))):
        left -= len(block)
        given += len(stream.decompress(block))
    if given != needed:
        return f"{given} bytes of {needed} (uncompressed)"
    return "" if stream.eof else "a compressed stream without its end"


def _nrrd_damage(header: TextHeader, path: Path) -> str:
    """Return the damage in an NRRD file's compressed voxels: ITK counts them, but does not always verify the checksum."""
    if header.fields.get("encoding", "").lower() not in ("gz", "gzip"):
        return ""
    voxels = math.prod(int(number) for number in header.fields.get("sizes", "").split())
    most = voxels * 8 + MAX_SURPLUS
    source, start = header.voxels_of(path)
    with open_file(source) as file:
        file.seek(start)
        for _ in range(int(header.fields.get("lineskip", 0))):
            if not file.readline(MAX_SURPLUS):
                return "fewer lines than the header says to skip"
        given = 0
        stream = GzipReader(file)
        while given < most and (block := stream.read(1 << 20)):
            given += len(block)
    return f"more than {given} bytes of voxels" if given >= most else ""


def _voxel_bytes(header: TextHeader) -> int:
    """Return the bytes per voxel, or 1 for an unknown type."""
    if (kind := _ELEMENT_TYPE.fullmatch(header.fields.get("ElementType", ""))) is not None:
        return _ELEMENT_BYTES.get(kind[1], 1) * int(header.fields.get("ElementNumberOfChannels", 1))
    return _NRRD_BYTES.get(header.fields.get("type", "").lower().removeprefix("unsigned ").removesuffix(" int"), 1)


def _true(fields: Mapping[str, str], key: str) -> bool:
    """Return a boolean field as ITK reads it: MetaImages are binary and uncompressed by default."""
    return fields.get(key, "True" if key == "BinaryData" else "False")[:1] in ("T", "t", "1")
