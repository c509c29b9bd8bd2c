"""List the files of a folder or .zip of DICOM, with limits on their number and size."""

from __future__ import annotations

import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from zlib import error as ZlibError

from ensemble.errors import InputRefused
from ensemble.files import cannot_open_error, lexists, open_file, refuse_irregular_file
from ensemble.readers.names import ARCHIVE, SLICE_SUFFIXES

#: Limits of one examination; an archive with more contains several patients.
MAX_FILES, MAX_UNPACKED_BYTES = 20_000, 4 << 30
#: Limits of an archive: inflation ratio (2 to 20 for images of a head) above a free allowance, and size of its directory.
_MAX_INFLATION, _FREE_BYTES, _MAX_DIRECTORY_BYTES = 100, 64 << 20, 16 << 20
#: The end of an archive (APPNOTE.TXT 4.3.14 to 4.3.16): longest last record, and the signatures of the records with the directory's size.
_LONGEST_END, _END, _END_64 = 1 << 17, b"PK\5\6", b"PK\6\6"
_DAMAGE = (zipfile.BadZipFile, ZlibError, OSError, EOFError, RuntimeError, NotImplementedError, ValueError)


def is_read_as_dicom(path: Path) -> bool:
    """Return whether a path is read as DICOM: a folder, a .zip, or a file with a DICOM suffix (which may hold a whole series)."""
    return path.suffix.lower() in (ARCHIVE, *SLICE_SUFFIXES) or is_folder(path)


def has_dicom_signature(path: Path) -> bool:
    """Return whether a file begins like DICOM, whatever its name. Raises OSError."""
    with open_file(path) as file:
        return file.read(132)[128:] == b"DICM"


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; False, too, for a path that can't be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False  # a name too long, or a folder that may not be searched: opening it will say so


@contextmanager
def unpacked_files(path: Path, label: str) -> Iterator[list[Path]]:
    """Yield all files of a folder, a single file, or the temporarily unpacked files of an archive. Raises InputRefused."""
    if is_folder(path):
        yield _listing(path, path, label)
        return
    if path.suffix.lower() in SLICE_SUFFIXES:
        try:
            refuse_irregular_file(path)
        except OSError as error:
            raise cannot_open_error(f"the {label} image", path, error) from error
        yield [path]
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(path, folder, label)
        yield _listing(Path(folder), path, label)


def _unpack(path: Path, folder: str, label: str) -> None:
    try:
        file = open_file(path)
    except OSError as error:
        raise cannot_open_error(f"the {label} image", path, error) from error
    try:
        with file, zipfile.ZipFile(_with_short_directory(file, path, label)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _refuse_too_much(members, path, label)
            archive.extractall(folder, members)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputRefused(
                f"the {label} archive can't be unpacked",
                where=path,
                found=error.strerror or str(error),
                do="make free space in the temporary folder, choose another one with TMPDIR, or unpack the archive and give the folder",
            ) from error
        problem = (
            "is encrypted or compressed in an unsupported way" if isinstance(error, RuntimeError) else "is damaged"
        )
        raise InputRefused(
            f"the {label} archive {problem}",
            where=path,
            found=str(error) or type(error).__name__,
            do="copy it again, or unpack it and give the folder",
        ) from error


def _with_short_directory(file: BinaryIO, path: Path, label: str) -> BinaryIO:
    """Return the archive if its directory is short enough to be read into memory. Raises InputRefused."""
    size = file.seek(0, 2)
    file.seek(max(size - _LONGEST_END, 0))
    end = file.read()
    length = 0
    if (at := end.rfind(_END)) >= 0 and len(end) >= at + 16:
        (length,) = struct.unpack_from("<I", end, at + 12)
    if (at := end.rfind(_END_64)) >= 0 and len(end) >= at + 48:
        length = max(length if length != 0xFFFFFFFF else 0, *struct.unpack_from("<Q", end, at + 40))
    if min(length, size) > _MAX_DIRECTORY_BYTES:
        raise _too_large(
            path,
            label,
            f"{min(length, size) / 1e6:.0f} MB of file names; at most {_MAX_DIRECTORY_BYTES / 1e6:.0f} MB are allowed",
        )
    file.seek(0)
    return file


def _refuse_too_much(members: list[zipfile.ZipInfo], path: Path, label: str) -> None:
    """Raise InputRefused if an archive's declared size would fill the disk; no more than declared is unpacked."""
    unpacked, packed = sum(member.file_size for member in members), path.stat().st_size
    if len(members) > MAX_FILES or unpacked > MAX_UNPACKED_BYTES:
        raise _too_large(
            path,
            label,
            f"{len(members)} files, {unpacked / 1e9:.1f} GB unpacked; "
            f"at most {MAX_FILES} and {MAX_UNPACKED_BYTES / 1e9:.1f} GB are allowed",
        )
    if unpacked > _MAX_INFLATION * packed + _FREE_BYTES:
        raise InputRefused(
            f"the {label} archive would inflate to {unpacked / packed:.0f} times its size, which images never do",
            where=path,
            found=f"{unpacked / 1e6:.0f} MB in {packed / 1e6:.1f} MB; {_MAX_INFLATION} times are allowed",
            do="pack the series again, or give the folder of its files",
        )


def _too_large(path: Path, label: str, found: str) -> InputRefused:
    what = f"the {label} archive is too large for one examination"
    return InputRefused(what, where=path, found=found, do="pack only the series of this case")


def _listing(folder: Path, path: Path, label: str) -> list[Path]:
    files = [  # links to nowhere, too: slices may be missing there
        file
        for file in sorted(folder.rglob("*"))
        if (file.is_file() or (lexists(file) and not file.exists()))
        and not file.name.startswith(".")
        and file.name.upper() != "DICOMDIR"
    ]
    if len(files) > MAX_FILES:
        raise InputRefused(
            f"the {label} folder holds too many files for one examination",
            where=path,
            found=f"{len(files)} files; at most {MAX_FILES} are allowed",
            do="give a folder with only this case's series",
        )
    return files
