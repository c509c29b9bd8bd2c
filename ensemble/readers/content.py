"""Recognise files by their first bytes, to report content that contradicts the name."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.files import open_file
from ensemble.readers.inflate import GzipReader
from ensemble.readers.integrity import damaged_file_error, unreadable_file_error
from ensemble.readers.names import image_suffix

_BEGIN = 1024
_NAME = "rename it with the right suffix"
_AGAIN = "download the image itself"
#: Beginnings of the advice that concerns the content of a compressed file.
_CHANGES = (_NAME, "convert it")
#: First bytes (a pattern), what holds them, and what to do. The first that fits counts.
_CONTENTS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (
        re.compile(rb"/?(\.git/)?annex/objects/"),
        "a pointer of git-annex",
        "fetch the file itself: git annex get, or datalad get",
    ),
    (re.compile(rb".{128}DICM", re.S), "DICOM", f"{_NAME} (.dcm), or give the folder of its series"),
    (re.compile(rb"NRRD000\d"), "NRRD", f"{_NAME} (.nrrd, or .nhdr for a header alone)"),
    (
        re.compile(rb"\s*(ObjectType|NDims|Comment|ElementType)[ \t]*[=:]"),
        "MetaImage",
        f"{_NAME} (.mha, or .mhd for a header alone)",
    ),
    (re.compile(rb"PK\x03\x04"), "a zip archive", f"{_NAME} (.zip) if it holds DICOM, or unpack it"),
    (re.compile(rb"\x1f\x8b"), "a gzip file", "unpack it, and give it the suffix of its content"),
    (re.compile(rb"\x89HDF\r\n|CDF[\x01\x02]"), "HDF5 or netCDF (MINC)", "convert it: mnc2nii, or nibabel"),
    (re.compile(rb"BZh\d1AY|\xfd7zXZ|7z\xbc\xaf|Rar!"), "an archive", "unpack it, and give the image in it"),
    (
        re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0{4}|II\*\0|MM\0\*|%PDF", re.S),
        "a picture or document",
        "give the original image of the scanner",
    ),
    (re.compile(rb"\s*<(!DOCTYPE|html|\?xml)", re.I), "a web page", f"{_AGAIN}: the saved file is a web page about it"),
    (re.compile(rb"\s*[{\[]\s*[\"{\[]"), "JSON", "give the image that it belongs to"),
)
_OWN = {".mha": "MetaImage", ".mhd": "MetaImage", ".nrrd": "NRRD", ".nhdr": "NRRD"}


def refuse_mislabelled_file(path: Path, label: str) -> None:
    """Raise InputRefused for a file other than NIfTI whose content does not match its suffix. Raises OSError."""
    suffix = image_suffix(path)
    with open_file(path) as file:
        begin = file.read(_BEGIN)
    named = f"in a file named {suffix}"
    if begin[:2] == b"\x1f\x8b":
        try:
            with open_file(path) as file:
                begin, named = GzipReader(file).exactly(_BEGIN), f"compressed, {named}"
        except (EOFError, ValueError, zlib.error) as error:
            raise damaged_file_error(path, label, str(error) or type(error).__name__) from error
    compressed = named.startswith("compressed")
    for pattern, what, do in _CONTENTS:
        if not pattern.match(begin):
            continue
        if what == _OWN.get(suffix) and not compressed:
            return
        raise InputRefused(
            f"the content of the {label} file does not match its name",
            where=path,
            found=f"{what}, {named}",
            do=f"unpack it, and {do}" if compressed and do.startswith(_CHANGES) else do,
        )
    if suffix not in _OWN or compressed:
        raise unreadable_file_error(path, label, f"no NIfTI header, compressed or not, but {begin[:16]!r}")
