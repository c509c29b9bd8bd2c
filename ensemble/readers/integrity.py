"""What ITK passes over in silence: truncated data that it fills up, and header fields that it replaces by guesses.

Field offsets: NIfTI-1 and NIfTI-2 (nifti.nimh.nih.gov), MetaImage (itk.org/Wiki/MetaIO).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ensemble.errors import InputRefused

_DAMAGE = (EOFError, OSError, zlib.error, struct.error, ValueError, OverflowError)
_METAIMAGE_NUMBERS = re.compile(
    rb"^(ElementSpacing|ElementSize|Offset|Position|Origin|TransformMatrix)\s*=\s*(.+?)\s*$", re.M
)


@dataclass(frozen=True)
class _NiftiLayout:
    """Where a NIfTI header's fields lie, as struct formats and byte offsets."""

    bytes: int
    dim: tuple[str, int]
    bitpix: tuple[str, int]
    pixdim: tuple[str, int]
    vox_offset: tuple[str, int]
    sform_code: tuple[str, int]
    srow: tuple[str, int]


#: By the header's own first number, its size.
_NIFTI = {
    348: _NiftiLayout(348, ("8h", 40), ("h", 72), ("8f", 76), ("f", 108), ("h", 254), ("12f", 280)),
    540: _NiftiLayout(540, ("8q", 16), ("h", 14), ("8d", 104), ("q", 168), ("i", 348), ("12d", 400)),
}


def refuse_damaged(path: Path, label: str) -> None:
    """Raise InputRefused for a file whose data are cut off, or whose header holds what can't be, as far as ITK would not say so."""
    name = path.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            found = _nifti_damage(path, compressed=name.endswith(".gz"))
        elif name.endswith((".mha", ".mhd")):
            found = _metaimage_damage(path)
        else:
            found = ""
    except _DAMAGE as error:
        found = str(error) or type(error).__name__
    if found:
        raise InputRefused(
            f"the {label} image is damaged or truncated", where=path, found=found, do="copy or export it again"
        )


def _nifti_damage(path: Path, *, compressed: bool) -> str:
    """What is wrong with a NIfTI file; empty when nothing is, or when ITK will refuse it anyway."""
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
        if not math.isfinite(offset) or offset < layout.bytes + 4:
            return f"data that begin at byte {offset}, inside the header"
        needed = int(offset) + math.prod(int(n) for n in dim[1 : axes + 1]) * int(read(layout.bitpix)[0]) // 8
        present = len(header) + sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
    return f"{present} bytes of {needed} (uncompressed)" if present < needed else ""


def _metaimage_damage(path: Path) -> str:
    """What is wrong with the geometry in a MetaImage header; ITK counts the data itself."""
    with path.open("rb") as file:
        header = file.read(16384)
    for key, text in _METAIMAGE_NUMBERS.findall(header[: header.find(b"ElementDataFile")]):
        numbers = [float(number) for number in text.split()]
        positive = key in (b"ElementSpacing", b"ElementSize")
        if not all(math.isfinite(number) and (number > 0 or not positive) for number in numbers):
            return f"{key.decode()} = {text.decode(errors='replace')}"
    return ""
