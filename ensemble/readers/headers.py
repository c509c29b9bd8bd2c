"""Text headers of MetaImage and NRRD files, and where the voxels lie that they describe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from ensemble.files import open_file

#: More than any header; one that goes on is none.
_LONGEST = 1 << 20
_METAIMAGE_LINE = re.compile(rb"^[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)\s*$", re.M)
_METAIMAGE_END = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:].*(?:\n|\Z)", re.M)
_NRRD_LINE = re.compile(rb"^([\w ]+?): *(.*?)\s*$", re.M)
_NRRD_END = re.compile(rb"^\r?\n", re.M)


@dataclass(frozen=True)
class TextHeader:
    """What a header says."""

    fields: Mapping[str, str]
    """By key; of MetaImage as it is, of NRRD in lower case and without blanks."""
    data_file: str
    """The file, or what names several, that holds the voxels; empty when they follow the header."""
    end: int
    """The byte behind the header."""

    @property
    def leads_out(self) -> bool:
        """Whether the file that is to hold the voxels lies elsewhere than in the header's folder or below it."""
        named = PurePath(self.data_file)
        return named.is_absolute() or ".." in named.parts

    def voxels_of(self, path: Path) -> tuple[Path, int]:
        """The file that holds the voxels of the image at `path`, and where they begin in it."""
        return (path.parent / self.data_file, 0) if self.data_file else (path, self.end)


def text_header(path: Path) -> TextHeader | None:
    """The header of a MetaImage or NRRD file, by its ending; None for other kinds and for what is no header. Raises OSError."""
    kind = path.suffix.lower()
    if kind not in (".mha", ".mhd", ".nrrd", ".nhdr"):
        return None
    with open_file(path) as file:
        head = file.read(_LONGEST)
    if kind in (".mha", ".mhd"):
        if (last := _METAIMAGE_END.search(head)) is None:
            return None
        fields = {key.decode(): os.fsdecode(text) for key, text in _METAIMAGE_LINE.findall(head[: last.end()])}
        data_file = fields["ElementDataFile"]
        return TextHeader(fields, "" if data_file in ("LOCAL", "Local", "local") else data_file, last.end())
    if not head.startswith(b"NRRD"):
        return None
    end = blank.end() if (blank := _NRRD_END.search(head)) is not None else len(head)
    fields = {key.decode().lower().replace(" ", ""): os.fsdecode(text) for key, text in _NRRD_LINE.findall(head[:end])}
    return TextHeader(fields, fields.get("datafile", ""), end)
