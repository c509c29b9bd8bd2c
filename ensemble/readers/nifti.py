"""Read NIfTI files, whatever their names: headers, and voxels as stored.

ITK computes the geometry from the header alone. It does not read the voxels, since it replaces NaN by 0 and an invalid scale by 1, and
reads neither NIfTI-2 nor compressed files without `.gz`. Fields: nifti1.h, nifti2.h (nifti.nimh.nih.gov).
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ensemble.files import open_file
from ensemble.geometry import MAX_SKEW
from ensemble.readers.inflate import GzipReader
from ensemble.readers.integrity import MAX_SURPLUS, refuse_decompression_bomb
from ensemble.types import AnyArray

#: A struct format and a byte offset.
_Field = tuple[str, int]

#: Scalar voxel types by their code, as numpy's without byte order; and those of several numbers a voxel.
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_SEVERAL = {32: "complex", 1792: "complex", 2048: "complex", 128: "RGB", 2304: "RGBA"}
#: The two places that a NIfTI header may name must agree to this, in voxels: viewers differ in which one they take.
_MAX_APART_VOXELS = 0.5
#: Deviation of the lengths of a matrix's columns from the voxel size, as share: above the first the header contradicts itself, above the
#: second its sform counts, as in other programs, where ITK would take the voxel size.
_STRETCH, _ROUNDED = 0.01, 1e-3
#: Length of b, c, d above which they are no part of a unit quaternion, rounding aside.
_LONGEST_QUATERNION = 1.001
#: Deviation from right angles that ITK accepts in an sform; beyond it (1e-4), ITK takes the qform or refuses the file.
_ITK_SKEW = 5e-5


@dataclass(frozen=True)
class _Layout:
    """The offsets of the header fields."""

    length: int
    magic: _Field
    """That of a header with the voxels in the same file."""
    its_magic: bytes
    datatype: _Field
    bitpix: _Field
    dim: _Field
    pixdim: _Field
    vox_offset: _Field
    scale: _Field
    """Slope and intercept."""
    codes: _Field
    """Of qform and sform."""
    quaternion: _Field
    """b, c, d, and the position of the first voxel."""
    srow: _Field
    units: _Field
    intent: _Field


#: By the header's own first number, its size: NIfTI-1 and NIfTI-2.
_LAYOUTS = {
    348: _Layout(
        *(348, ("4s", 344), b"n+1\0", ("h", 70), ("h", 72), ("8h", 40), ("8f", 76), ("f", 108)),
        *(("2f", 112), ("2h", 252), ("6f", 256), ("12f", 280), ("b", 123), ("h", 68)),
    ),
    540: _Layout(
        *(540, ("8s", 4), b"n+2\0\r\n\x1a\n", ("h", 12), ("h", 14), ("8q", 16), ("8d", 104), ("q", 168)),
        *(("2d", 176), ("2i", 344), ("6d", 352), ("12d", 400), ("i", 500), ("i", 504)),
    ),
}


@dataclass(frozen=True)
class NiftiHeader:
    """The header of a NIfTI file."""

    path: Path
    compressed: bool
    header: bytes
    order: str
    """Byte order, as `struct` and numpy call it."""
    layout: _Layout

    def read(self, field: _Field) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + field[0], self.header, field[1])

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels along x, y, z, ...; trailing axes of length 1 beyond z are dropped."""
        count, *sizes = (int(n) for n in self.read(self.layout.dim))
        sizes = sizes[:count]
        while len(sizes) > 3 and sizes[-1] == 1:
            sizes.pop()
        return tuple(sizes)

    @property
    def not_scalar(self) -> str:
        """The content of a voxel if it is more than one number; else empty."""
        return _SEVERAL.get(int(self.read(self.layout.datatype)[0]), "")

    @property
    def scale(self) -> tuple[float, float]:
        """Slope and intercept from stored numbers to values; the identity if the slope is 0 (nifti1.h) or NaN."""
        slope, intercept = self.read(self.layout.scale)
        return (1.0, 0.0) if slope == 0 or math.isnan(slope) else (slope, intercept)

    @property
    def sform(self) -> tuple[float, ...] | None:
        """The 3x4 matrix from voxel to world (RAS), row by row; None if there is none."""
        return self.read(self.layout.srow) if self.read(self.layout.codes)[1] > 0 else None

    @property
    def form(self) -> int:
        """The larger of its two form codes: 3 is Talairach, 4 is MNI152."""
        return int(max(self.read(self.layout.codes)))

    def fault(self, remarks: list[str]) -> str:
        """Return what is wrong with the header; empty if nothing is. Adds oddities to `remarks`."""
        layout = self.layout
        if self.read(layout.magic)[0] != layout.its_magic:
            return "not the header of a single-file NIfTI (it may be ANALYZE, or the .hdr of a pair)"
        dim, pixdim, offset = self.read(layout.dim), self.read(layout.pixdim), self.read(layout.vox_offset)[0]
        axes = int(dim[0])
        if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
            return f"dimensions {list(dim)}"
        if not all(math.isfinite(mm) and mm > 0 for mm in pixdim[1 : min(axes, 3) + 1]):
            return f"voxel size {list(pixdim[1:4])}"
        qform_code, sform_code = self.read(layout.codes)
        srow = self.read(layout.srow)
        if sform_code > 0 and not all(map(math.isfinite, srow)):
            return "an orientation that is not a number"
        quaternion = self.read(layout.quaternion)
        if qform_code > 0 and sform_code <= 0 and not all(map(math.isfinite, quaternion)):
            return "an orientation that is not a number"
        if qform_code > 0 and sform_code <= 0 and (length := math.hypot(*quaternion[:3])) > _LONGEST_QUATERNION:
            return f"a qform that is no rotation (quaternion of length {length:.3g})"
        sform = np.reshape(srow, (3, 4)) if sform_code > 0 else None
        qform = _quaternion_affine(quaternion, pixdim) if qform_code > 0 else None
        if axes >= 3 and (found := _misplaced(sform, qform, [int(n) for n in dim[1:4]], pixdim[1:4], remarks)):
            return found
        if not math.isfinite(offset) or offset < layout.length + 4:
            return f"data offset {offset}, inside the header"
        if offset > MAX_SURPLUS:
            return f"data offset {offset:.0f}"
        return self._voxel_fault()

    def _voxel_fault(self) -> str:
        code, bits = (int(self.read(field)[0]) for field in (self.layout.datatype, self.layout.bitpix))
        if code not in _TYPES and code not in _SEVERAL:
            return f"an unsupported voxel type (NIfTI datatype {code}): convert it to float32"
        if code in _TYPES and bits not in (0, 8 * np.dtype(_TYPES[code]).itemsize):
            return f"voxels of {bits} bits, which does not fit datatype {code}"
        slope, intercept = self.read(self.layout.scale)
        unset = slope == 0 or (math.isnan(slope) and (intercept == 0 or math.isnan(intercept)))
        if not unset and not (math.isfinite(slope) and math.isfinite(intercept)):
            return f"values scaled by {slope:g} and {intercept:g} (scl_slope, scl_inter)"
        return ""

    def shortfall(self) -> str:
        """Describe missing voxel data, as far as known before memory is allocated; empty if complete."""
        present = self.path.stat().st_size
        if int(self.read(self.layout.datatype)[0]) not in _TYPES:
            return ""
        if not self.compressed and present < self._needed:
            return f"{present} bytes of {self._needed} (uncompressed)"
        return ""

    def refuse_decompression_bomb(self, label: str) -> None:
        """Raise InputRefused if the file inflates at a ratio that no scan reaches."""
        if self.compressed:
            refuse_decompression_bomb(self._needed, self.path.stat().st_size, self.path, label)

    @property
    def _kind(self) -> np.dtype[Any]:
        return np.dtype(self.order + _TYPES[int(self.read(self.layout.datatype)[0])])

    @property
    def _needed(self) -> int:
        """Bytes that the uncompressed file must have."""
        return int(self.read(self.layout.vox_offset)[0]) + math.prod(self.size) * self._kind.itemsize

    def voxels(self) -> AnyArray:
        """Return the stored numbers (..., z, y, x), not scaled.

        Raises ValueError when some are missing or the file holds much more; OSError, EOFError, zlib.error when it is damaged.
        """
        stored = np.empty(math.prod(self.size), self._kind)
        content, offset, needed = stored.view(np.uint8).data, int(self.read(self.layout.vox_offset)[0]), self._needed
        with self.open() as file:
            present = _skip(file, offset)
            while present < needed and (block := file.read(min(needed - present, 1 << 20))):
                content[present - offset : present - offset + len(block)] = block
                present += len(block)
            while present < needed + MAX_SURPLUS and (block := file.read(1 << 20)):  # to gzip's checksum, at its end
                present += len(block)
        if present < needed:
            raise ValueError(f"{present} bytes of {needed} (uncompressed)")
        if present >= needed + MAX_SURPLUS:
            raise ValueError(f"more than {present} bytes, but the header says {needed}")
        return stored.reshape(self.size[::-1])

    @contextmanager
    def place_for_itk(self) -> Iterator[Path]:
        """Yield a temporary file with the header and no voxels, from which ITK reads the geometry."""
        with tempfile.TemporaryDirectory() as folder:
            header = bytearray(self._as_nifti1() + bytes(4))
            axes, mm = self._skewed_axes(), self._stretched_mm()
            order, old = (self.order if self.layout is _LAYOUTS[348] else "<"), _LAYOUTS[348]
            if axes is not None:
                left, _, right = np.linalg.svd(axes)
                sform = np.reshape(self.read(self.layout.srow), (3, 4))
                straight = np.column_stack([left @ right * np.linalg.norm(sform[:, :3], axis=0), sform[:, 3]])
                struct.pack_into(order + old.srow[0], header, old.srow[1], *straight.ravel())
            if mm is not None:
                struct.pack_into(order + "3f", header, old.pixdim[1] + 4, *mm)
            if axes is not None or mm is not None:
                struct.pack_into(order + old.codes[0], header, old.codes[1], 0, 1)
            (path := Path(folder) / "header.nii").write_bytes(header)
            yield path

    def direction(self) -> tuple[float, ...] | None:
        """Return the direction cosines (LPS, row by row) if the sform's axes are slightly skewed, which ITK would reject; else None."""
        axes = self._skewed_axes()
        return None if axes is None else tuple((np.diag((-1.0, -1.0, 1.0)) @ axes + 0.0).ravel().tolist())

    def _skewed_axes(self) -> AnyArray | None:
        """Return the sform's unit vectors (RAS, in columns) if they are slightly skewed; else None."""
        if self.read(self.layout.codes)[1] <= 0 or len(self.size) < 3:
            return None
        sform = np.reshape(self.read(self.layout.srow), (3, 4))[:, :3]
        axes = sform / np.linalg.norm(sform, axis=0)
        return axes if np.abs(axes.T @ axes - np.eye(3)).max() > _ITK_SKEW else None

    def _stretched_mm(self) -> AnyArray | None:
        """Return the voxel size by the sform if it is not that of the header, rounding aside; else None."""
        if self.sform is None or len(self.size) < 3:
            return None
        lengths = np.linalg.norm(np.reshape(self.sform, (3, 4))[:, :3], axis=0)
        return lengths if np.abs(lengths / self.read(self.layout.pixdim)[1:4] - 1).max() > _ROUNDED else None

    def _as_nifti1(self) -> bytes:
        """Return the header as NIfTI-1; from NIfTI-2, the fields for geometry, size and type are converted.

        Raises struct.error for what does not fit.
        """
        old = _LAYOUTS[348]
        if self.layout is old:
            return self.header[: old.length]
        header = bytearray(old.length)
        struct.pack_into("<i", header, 0, old.length)
        for name in ("datatype", "bitpix", "dim", "pixdim", "codes", "quaternion", "srow", "units", "intent"):
            field: _Field = getattr(old, name)
            struct.pack_into("<" + field[0], header, field[1], *self.read(getattr(self.layout, name)))
        struct.pack_into("<f", header, old.vox_offset[1], 352)
        struct.pack_into(old.magic[0], header, old.magic[1], old.its_magic)
        return bytes(header)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with open_file(self.path) as file:
            yield cast(BinaryIO, GzipReader(file)) if self.compressed else file


def read_nifti_header(path: Path) -> NiftiHeader | None:
    """Return a file's NIfTI header, whatever the file is called; None if it has none.

    Raises OSError, EOFError or zlib.error for a damaged file.
    """
    with open_file(path) as file:
        begin = file.read(540)
    if compressed := begin[:2] == b"\x1f\x8b":
        with open_file(path) as file:
            begin = GzipReader(file).exactly(540)
    for order in "<>":
        size = struct.unpack(order + "i", begin[:4])[0] if len(begin) >= 4 else 0
        layout = _LAYOUTS.get(size)
        if layout is not None and len(begin) >= layout.length:
            return NiftiHeader(path, compressed, begin, order, layout)
    return None


def _skip(file: BinaryIO, left: int) -> int:
    """Skip bytes of a file; return how many were there."""
    skipped = 0
    while skipped < left and (block := file.read(min(left - skipped, 1 << 20))):
        skipped += len(block)
    return skipped


def _misplaced(
    sform: AnyArray | None, qform: AnyArray | None, size: list[int], voxel_mm: Sequence[float], remarks: list[str]
) -> str:
    """Return what is wrong with the geometry of a NIfTI header: ITK silently uses the qform if it can't use the sform."""
    if sform is None and qform is None:
        remarks.append("its header has no position and orientation (NIfTI form codes 0): axes used as stored")
        return ""
    if sform is None:
        return ""
    lengths = np.linalg.norm(sform[:, :3], axis=0)
    if not (lengths > 0).all():
        return "an sform that flattens the image"
    unit = sform[:, :3] / lengths
    if np.abs(unit.T @ unit - np.eye(3)).max() > MAX_SKEW:
        return "an sform whose axes are not orthogonal (sheared): resample the image to orthogonal axes"
    if np.abs(lengths / np.asarray(voxel_mm) - 1).max() > _STRETCH:
        return f"voxels of {lengths.round(4).tolist()} mm by the sform, {list(voxel_mm)} mm by pixdim"
    if qform is None:
        return ""
    ends = np.array([(x, y, z, 1) for x in (0, size[0] - 1) for y in (0, size[1] - 1) for z in (0, size[2] - 1)])
    apart = float((np.linalg.norm((sform - qform) @ ends.T, axis=0)).max() / min(voxel_mm))
    if not apart <= _MAX_APART_VOXELS:
        return f"sform and qform differ by {apart:.3g} voxels: write the right one to both"
    return ""


def _quaternion_affine(quaternion: Sequence[float], pixdim: Sequence[float]) -> AnyArray:
    """Return the 3x4 matrix of a NIfTI qform (method 2 of nifti1.h)."""
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
