"""Parse the text headers of MetaImage and NRRD files, and find the voxels that they describe."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ensemble.files import open_file

#: Endings of MetaImage and NRRD files.
TEXT_HEADERS = (".mha", ".mhd", ".nrrd", ".nhdr")
#: Longer than any valid header.
_LONGEST = 1 << 20
#: Longer lines of an NRRD header overrun teem's buffers. Comments, keys with values and what the content is may be longer.
_LONGEST_LINE = 800
_NRRD_LONG = re.compile(rb"#|content:|[^:]*:=")
_METAIMAGE_LINE = re.compile(rb"^[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)\s*$", re.M)
_METAIMAGE_END = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:].*(?:\n|\Z)", re.M)
_NRRD_LINE = re.compile(rb"^([\w ]+?): *(.*?)\s*$", re.M)
_NRRD_END = re.compile(rb"^\r?\n", re.M)


@dataclass(frozen=True)
class TextHeader:
    """The fields of a text header."""

    fields: Mapping[str, str]
    """By key; of MetaImage as it is, of NRRD in lower case and without blanks."""
    data_file: str
    """The file, or what names several, that holds the voxels; empty when they follow the header."""
    end: int
    """The byte behind the header."""
    oddity: str = ""
    """What no sound header has, and libraries answer with a crash or with a guess."""

    @property
    def leads_out(self) -> bool:
        """Whether the data file is outside the header's folder."""
        named = PurePath(self.data_file)
        return named.is_absolute() or ".." in named.parts

    def voxels_of(self, path: Path) -> tuple[Path, int]:
        """Return the file that holds the voxels of the image at `path`, and their offset in it."""
        return (path.parent / self.data_file, 0) if self.data_file else (path, self.end)


def read_text_header(path: Path) -> TextHeader | None:
    """Return the header of a MetaImage or NRRD file, by its suffix; None for other files and invalid headers. Raises OSError."""
    kind = path.suffix.lower()
    if kind not in TEXT_HEADERS:
        return None
    with open_file(path) as file:
        head = file.read(_LONGEST)
    if kind in (".mha", ".mhd"):
        if (last := _METAIMAGE_END.search(head)) is None:
            return None
        lines = [(key.decode(), os.fsdecode(text)) for key, text in _METAIMAGE_LINE.findall(head[: last.end()])]
        fields = dict(lines)
        data_file = fields["ElementDataFile"]
        oddity = _repeated([key for key, _ in lines])
        return TextHeader(fields, "" if data_file in ("LOCAL", "Local", "local") else data_file, last.end(), oddity)
    if not head.startswith(b"NRRD"):
        return None
    end = blank.end() if (blank := _NRRD_END.search(head)) is not None else len(head)
    lines = [(key.decode().lower().replace(" ", ""), os.fsdecode(text)) for key, text in _NRRD_LINE.findall(head[:end])]
    fields = dict(lines)
    names = [key for key, text in lines if not text.startswith("=")]  # `key:=value` is no field
    longest = max((len(line) for line in head[:end].splitlines() if not _NRRD_LONG.match(line)), default=0)
    oddity = f"a line of {longest} characters" if longest > _LONGEST_LINE else _repeated(names)
    return TextHeader(fields, fields.get("datafile", ""), end, oddity)


def _repeated(keys: Sequence[str]) -> str:
    """Return the key that a header has more than once: programs differ in the one they use."""
    return next((f"{key} appears twice" for key, count in Counter(keys).items() if count > 1), "")
