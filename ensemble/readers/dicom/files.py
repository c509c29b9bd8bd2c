"""Which files a folder or .zip of DICOM holds, and how many of them one examination may have."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import error as ZlibError

from ensemble.errors import InputRefused
from ensemble.readers.names import ARCHIVE, SLICE_SUFFIXES

#: Of one examination; more is an archive of patients, not a case.
MOST_FILES, MOST_UNPACKED_BYTES = 20_000, 4 << 30
_DAMAGE = (zipfile.BadZipFile, ZlibError, OSError, EOFError, RuntimeError, NotImplementedError, ValueError)


def is_dicom(path: Path) -> bool:
    """Whether a path is read as DICOM: a folder, a .zip, or a file named as one of DICOM (which may hold a whole series)."""
    return path.suffix.lower() in (ARCHIVE, *SLICE_SUFFIXES) or is_folder(path)


def begins_as_dicom(path: Path) -> bool:
    """Whether a file begins as one of DICOM does, whatever its name. Raises OSError."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # a name too long, or a folder that may not be searched: opening it will say so


@contextmanager
def files_of(path: Path, label: str) -> Iterator[list[Path]]:
    """All files of a folder, or a file alone; or those of an archive, unpacked for as long as the block lasts. Raises InputRefused."""
    if is_folder(path):
        yield _listing(path, path, label)
        return
    if path.suffix.lower() in SLICE_SUFFIXES:
        if not path.exists():
            raise InputRefused(f"the {label} image does not exist", where=path, do="check the path")
        yield [path]
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(path, folder, label)
        yield _listing(Path(folder), path, label)


def _unpack(path: Path, folder: str, label: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            unpacked = sum(member.file_size for member in members)
            if len(members) > MOST_FILES or unpacked > MOST_UNPACKED_BYTES:
                raise InputRefused(
                    f"the {label} archive is too large for one examination",
                    where=path,
                    found=f"{len(members)} files, {unpacked / 1e9:.1f} GB unpacked",
                    do="pack the series of this case alone",
                )
            archive.extractall(folder, members)
    except FileNotFoundError as error:
        raise InputRefused(f"the {label} image does not exist", where=path, do="check the path") from error
    except _DAMAGE as error:
        raise InputRefused(
            f"the {label} archive is damaged, or can't be unpacked",
            where=path,
            found=str(error) or type(error).__name__,
            do="copy it again, or unpack it and give the folder",
        ) from error


def _listing(folder: Path, path: Path, label: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name.upper() != "DICOMDIR"
    ]
    if len(files) > MOST_FILES:
        raise InputRefused(
            f"the {label} folder holds too many files for one examination",
            where=path,
            found=f"{len(files)} files",
            do="give the folder of this case's series",
        )
    return files
