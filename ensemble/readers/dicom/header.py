"""Read the header of one DICOM file with pydicom, and find its pixel data; limits protect against hostile files.

Files: PS3.10 7; encodings: PS3.5 7 and A.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ensemble.files import open_file, refuse_irregular_file
from ensemble.readers.dicom import facts
from ensemble.readers.names import SLICE_SUFFIXES

# Every oddity of a header would be a line in our log.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.ERROR)

#: A smaller file is loaded into memory, a larger one is read from disk. No header is longer than the second.
_SMALL_BYTES, _MAX_HEADER_BYTES = 16 << 20, 256 << 20
#: Items of sequences that a header may have: 65,536 frames with ten groups each. Every one becomes an object of some 1.5 kB.
MAX_ITEMS = 700_000
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
#: File meta information, which names the transfer syntax, ends before this.
_MAX_META_BYTES = 1 << 10
#: Limits of a deflated data set: inflated size, and inflation ratio above a free allowance. Only its beginning is searched for the header.
_MAX_INFLATED_BYTES, _MAX_INFLATION, _FREE_BYTES = 1 << 30, 100, 64 << 20
_HEADER_BYTES = (_SMALL_BYTES, _FREE_BYTES)
_LONG_VR = (b"OB", b"OW", b"UN", b"OF", b"OD")
#: How a data set without preamble begins: a small element of group 0002 or 0008, little endian.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")


class NotDicom(Exception):
    """A file looks like DICOM by name or first bytes but can't be read; the message states the reason."""


@dataclass(frozen=True)
class PixelDataElement:
    """Position of the pixel data in a file (in the inflated data set, if that is deflated)."""

    start: int
    length: int | None
    """Length in bytes; None for encapsulated pixel data, which state it item by item."""
    vr: str
    """Empty in implicit files."""
    tag: int = facts.INTEGER_PIXELS
    """Its tag: integers, floats or doubles."""


@dataclass(frozen=True)
class DicomHeader:
    """The header of a file, up to its pixels."""

    dataset: Dataset
    syntax: UID
    pixels: PixelDataElement | None
    """None for an object without pixel data."""
    bytes: int
    """Of the file, or of the inflated data set."""


class _Bounded(io.BufferedReader):
    """A file object that never returns more than the file has, nor more than a header needs."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        at = self.tell()
        if at > _MAX_HEADER_BYTES:
            raise ValueError(f"no pixel data within {at} bytes")
        left = max(self._size - at, 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def read_header(path: Path) -> DicomHeader | None:
    """Return the header of a file; None if it is not DICOM. Raises NotDicom if it only looks like DICOM, and OSError."""
    refuse_irregular_file(path)
    with path.open("rb", buffering=0) as file:
        begin = file.read(132)
        with_preamble = begin[128:] == b"DICM"
        if not with_preamble and not _begins_like(begin) and path.suffix.lower() not in SLICE_SUFFIXES:
            return None  # whatever it is and however large: not read
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        stream: Any = io.BytesIO(file.readall()) if size <= _SMALL_BYTES else _Bounded(file, size)
        try:
            header = _parse(stream, size)
        except facts.MALFORMED as error:
            raise NotDicom(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    dataset, named = header.dataset, with_preamble or path.suffix.lower() in SLICE_SUFFIXES
    if dataset.file_meta.get("MediaStorageSOPClassUID") == facts.DIRECTORY:
        return None
    if "SOPClassUID" not in dataset and "Rows" not in dataset:
        if named:
            raise NotDicom("neither a SOP class nor an image size")
        return None
    if header.pixels is None and "SeriesInstanceUID" not in dataset:
        raise NotDicom("it ends within its header")
    return header


def inflate_file(path: Path, max_bytes: int) -> bytes:
    """Return the first `max_bytes` bytes of a deflated file with the deflation removed. Raises one of `facts.MALFORMED`."""
    with open_file(path) as file:
        return _inflate(file.read(), max_bytes)[0]


def _begins_like(begin: bytes) -> bool:
    """Return whether a file without preamble begins like a DICOM data set."""
    if begin[:2] not in _FIRST_GROUPS or begin[3:4] != b"\x00":
        return False
    return begin[4:6] in (b"UL", b"CS", b"UI", b"SH", b"DA", b"OB") or begin[6:8] == b"\x00\x00"


def _parse(stream: Any, size: int) -> DicomHeader:
    begin = stream.read(_MAX_META_BYTES)
    stream.seek(0)
    deflated = begin[128:132] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in begin
    if not deflated:
        return _parse_explicit(stream, size)
    packed = stream.read()
    for most in _HEADER_BYTES:
        content, size = _inflate(packed, most)
        try:
            header = _parse_explicit(io.BytesIO(content), size)
        except facts.MALFORMED:
            if size <= most or most == _HEADER_BYTES[-1]:
                raise
            continue
        if header.pixels is not None or size <= most:
            break
    return replace(header, syntax=DeflatedExplicitVRLittleEndian)


def _parse_explicit(stream: Any, size: int) -> DicomHeader:
    _refuse_too_many_items(stream)
    dataset = read_partial(
        stream, _at_pixels, force=True, specific_tags=facts.TAGS
    )  # dcmread makes tags of all tags anew
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    if syntax == "":
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    pixels = _pixel_element(stream, syntax)
    return DicomHeader(dataset, syntax, pixels, size)


def _refuse_too_many_items(stream: Any) -> None:
    """Raise ValueError for a header with too many items, before parsing it fills the memory."""
    items = at = 0
    while at < _MAX_HEADER_BYTES and (block := stream.read(_SMALL_BYTES)):
        items, at = items + sum(map(block.count, _ITEMS)), at + len(block)
    stream.seek(0)
    if items > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} items of sequences")


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:
    return tag in facts.PIXEL_DATA


def _inflate(content: bytes, most: int) -> tuple[bytes, int]:
    """Return the first `max_bytes` bytes of an inflated file, and its total inflated size.

    Raises ValueError if it grows as no image does, or has no end.
    """
    stream = io.BytesIO(content)
    stream.seek(132)
    pydicom.filereader._read_file_meta_info(stream)
    head = content[: stream.tell()].replace(
        DeflatedExplicitVRLittleEndian.encode(), ExplicitVRLittleEndian.encode() + b"\0\0\0"
    )
    packed, kept, count = zlib.decompressobj(-zlib.MAX_WBITS), bytearray(head), len(head)
    limit = min(_MAX_INFLATED_BYTES, _FREE_BYTES + _MAX_INFLATION * len(content))
    while not packed.eof and (block := stream.read(1 << 14)):
        body = packed.decompress(block)
        kept += body[: max(most - len(kept), 0)]
        count += len(body)
        if count > limit:
            raise ValueError(f"more than {limit} bytes when inflated, of {len(content)}")
    if not packed.eof:
        raise ValueError("a deflated data set without its end")
    return bytes(kept), count


def _pixel_element(stream: Any, syntax: UID) -> PixelDataElement | None:
    """Return the position of the pixel data, where pydicom stopped."""
    at = stream.tell()
    head = stream.read(12)
    order = "big" if syntax == ExplicitVRBigEndian else "little"
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)  # type: ignore[arg-type]
    if len(head) < 8 or tag not in facts.PIXEL_DATA:
        return None
    explicit = head[4:6] in _LONG_VR
    start = at + (12 if explicit else 8)
    length = int.from_bytes(head[start - at - 4 : start - at], order)  # type: ignore[arg-type]
    vr = head[4:6].decode() if explicit else ""
    return PixelDataElement(start, None if length == 0xFFFFFFFF else length, vr, tag)
