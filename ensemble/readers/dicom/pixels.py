"""Read the pixels of the chosen frames: native ones directly, encapsulated ones (JPEG, JPEG-LS, JPEG 2000, RLE) with GDCM or pydicom.

Stored values become what they mean by the public rescale alone (PS3.3 C.7.6.16.2.9): Philips' private slopes are for display.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import encaps
from pydicom.pixels import get_decoder
from pydicom.uid import RLELossless

from ensemble.errors import InputRefused
from ensemble.files import open_file
from ensemble.readers.dicom import header
from ensemble.readers.dicom.facts import MALFORMED
from ensemble.readers.dicom.frames import AGAIN, CONVERT, Frame, StoredPixels
from ensemble.types import AnyArray, FloatArray

#: Markers of a JPEG or JPEG-LS frame header (ISO 10918-1, 14495-1), and of a JPEG 2000 codestream's size (ISO 15444-1).
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JPEG_2000_SIZE = b"\xff\x4f\xff\x51"


class _Undecodable(Exception):
    """Pixels in a format that no available decoder reads."""


def read_pixels(volumes: Sequence[Sequence[Frame]], label: str, place_of: Callable[[Path], str]) -> FloatArray:
    """Return the values (n, z, y, x) float32 of frames by volume and slice.

    Raises InputRefused for damaged pixels, or a compression that can't be decoded.
    """
    columns, rows = volumes[0][0].size
    arrays = np.empty((len(volumes), len(volumes[0]), rows, columns), np.float32)
    by_file: dict[Path, list[tuple[Frame, int, int]]] = defaultdict(list)
    for n, volume in enumerate(volumes):
        for z, frame in enumerate(volume):
            by_file[frame.instance.path].append((frame, n, z))
    inverted = {
        path: [each for each, _, _ in wanted] for path, wanted in by_file.items() if _stored(wanted[0][0]).inverted
    }
    planes = (plane for path, frames in inverted.items() for plane in _planes(path, frames, label, place_of))
    black = max((float(plane.max()) for plane in planes), default=0.0)  # the largest stored value of the series
    for path, wanted in by_file.items():
        for (frame, n, z), plane in zip(
            wanted, _planes(path, [each for each, _, _ in wanted], label, place_of), strict=True
        ):
            values = black - plane.astype(np.float64) if _stored(frame).inverted else plane
            arrays[n, z] = values * frame.slope + frame.intercept if _rescaled(frame) else values
    return arrays


def refuse_differing_copies(copies: Sequence[tuple[Frame, Frame]], label: str, place_of: Callable[[Path], str]) -> None:
    """Raise InputRefused if two frames that should be copies have different pixels."""
    for frame, copy in copies:
        one, other = (next(_planes(each.instance.path, [each], label, place_of)) for each in (frame, copy))
        if not np.array_equal(one, other):
            raise InputRefused(
                f"two files of the {label} series have the same SOP instance UID but different pixels",
                where=place_of(copy.instance.path),
                found=f"the instance of {place_of(frame.instance.path)}",
                do="export the series again, or remove the file that does not belong to it",
            )


def _stored(frame: Frame) -> StoredPixels:
    assert frame.instance.stored is not None
    return frame.instance.stored


def _rescaled(frame: Frame) -> bool:
    return (frame.slope, frame.intercept) != (1.0, 0.0)


def _planes(path: Path, frames: Sequence[Frame], label: str, place_of: Callable[[Path], str]) -> Iterator[AnyArray]:
    """Yield the stored values (rows, columns) of frames or tiles of one file."""
    stored = _stored(frames[0])
    try:
        with _Frames(path, stored) as source:
            kept, at = source.plane(frames[0].index), frames[0].index
            for frame in frames:
                if frame.index != at:
                    kept, at = source.plane(frame.index), frame.index
                row, column = frame.tile or (0, 0)
                yield kept[row : row + frame.size[1], column : column + frame.size[0]]
    except _Undecodable as error:
        raise InputRefused(
            f"a file of the {label} series has an unsupported compression",
            where=place_of(path),
            found=str(error),
            do=CONVERT,
        ) from error
    except MALFORMED as error:
        raise InputRefused(
            f"a file of the {label} series is damaged or truncated",
            where=place_of(path),
            found=(str(error) or type(error).__name__).splitlines()[0],
            do=AGAIN,
        ) from error


class _Frames:
    """The stored frames of a file. Its methods raise _Undecodable, or one of MALFORMED."""

    def __init__(self, path: Path, stored: StoredPixels) -> None:
        self._stored = stored
        needed = stored.start + stored.frames * stored.frame_bytes
        self._content = header.inflate_file(path, needed) if stored.deflated else b""
        self._file = None if stored.deflated else open_file(path)
        self._encapsulated = self._read_encapsulated() if stored.length is None else b""

    def __enter__(self) -> _Frames:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def plane(self, index: int) -> AnyArray:
        """Return the stored values of a frame (rows, columns)."""
        stored = self._stored
        if not 0 <= index < stored.frames:
            raise ValueError(f"frame {index + 1} of {stored.frames}")
        plane = self._native(index) if stored.length is not None else self._decoded(index)
        unused = stored.bits_allocated - stored.bits_stored
        if unused and stored.length is not None:  # bits above the stored ones are not part of the value
            plane = plane << unused >> unused
        return plane

    def _native(self, index: int) -> AnyArray:
        stored = self._stored
        kind = np.dtype(
            f"{'>' if stored.big_endian else '<'}{'i' if stored.signed else 'u'}{stored.bits_allocated // 8}"
        )
        swapped = stored.big_endian and stored.bits_allocated == 8 and stored.vr == "OW"
        start = stored.start + index * stored.frame_bytes
        first = start - (index * stored.frame_bytes) % 2 if swapped else start  # pairs of bytes begin at even ones
        content = self._bytes(first, stored.frame_bytes + (start - first) + (stored.frame_bytes % 2 if swapped else 0))
        if swapped:
            content = np.frombuffer(content[: len(content) // 2 * 2], ">u2").astype("<u2").tobytes()
        content = content[start - first : start - first + stored.frame_bytes]
        return np.frombuffer(content, kind).reshape(stored.rows, stored.columns).astype(kind.newbyteorder("="))

    def _bytes(self, start: int, count: int) -> bytes:
        if self._file is None:
            return self._content[start : start + count]
        self._file.seek(start)
        return self._file.read(count)

    def _read_encapsulated(self) -> bytes:
        """Return the pixel data up to the sequence delimiter, which must exist (PS3.5 A.4)."""
        at = self._stored.start
        while True:
            head = self._bytes(at, 8)
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"\xfe\xff\xdd\xe0":
                return self._bytes(self._stored.start, at - self._stored.start)
            if head[:4] != b"\xfe\xff\x00\xe0" or length == 0xFFFFFFFF or len(head) < 8:
                raise ValueError("compressed pixel data without an end")
            at += 8 + length

    def _decoded(self, index: int) -> AnyArray:
        stored = self._stored
        frame = encaps.get_frame(self._encapsulated, index, number_of_frames=stored.frames)
        if (size := _coded_size(frame)) not in (None, (stored.columns, stored.rows)):
            raise ValueError(f"a compressed image of {size} in a frame of {stored.columns} x {stored.rows}")
        try:
            decoder = get_decoder(stored.syntax)
        except NotImplementedError as error:
            raise _Undecodable(stored.syntax.name) from error
        plugin = "pydicom" if stored.syntax == RLELossless else "gdcm"
        if plugin not in decoder.available_plugins:
            raise _Undecodable(stored.syntax.name)
        options: dict[str, Any] = {
            "rows": stored.rows,
            "columns": stored.columns,
            "number_of_frames": stored.frames,
            "samples_per_pixel": 1,
            "photometric_interpretation": "MONOCHROME2",
            "pixel_representation": int(stored.signed),
            "bits_allocated": stored.bits_allocated,
            "bits_stored": stored.bits_stored,
            "pixel_keyword": "PixelData",
        }
        plane, _ = decoder.as_array(self._encapsulated, index=index, raw=True, decoding_plugin=plugin, **options)
        return plane.reshape(stored.rows, stored.columns)


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Return columns and rows stated in a JPEG, JPEG-LS or JPEG 2000 stream; None if it does not state them.

    What it says is allocated.

    Raises ValueError for one of several components, each of which would be allocated.
    """
    if (at := frame.find(_JPEG_2000_SIZE, 0, 1024)) >= 0:
        right, bottom, left, top = (int.from_bytes(frame[at + k : at + k + 4], "big") for k in (8, 12, 16, 20))
        _refuse_components(int.from_bytes(frame[at + 40 : at + 42], "big"))
        return right - left, bottom - top
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in _FRAME_MARKERS:
            _refuse_components(int.from_bytes(frame[at + 9 : at + 10], "big"))
            return int.from_bytes(frame[at + 7 : at + 9], "big"), int.from_bytes(frame[at + 5 : at + 7], "big")
        at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _refuse_components(count: int) -> None:
    if count > 1:
        raise ValueError(f"{count} components in an image of one")
