"""Read the zip archives in which PyTorch stores tensors (torch.save, torch.jit.save), as data and with size limits."""

from __future__ import annotations

import pickle
import zipfile


def archive_root(archive: zipfile.ZipFile) -> str:
    """Return the top folder of the archive with a trailing slash; it is named after the file, or "archive".

    Raises UnpicklingError if there is none, or several, or for numbers that are not little-endian.
    """
    found = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise pickle.UnpicklingError(f"{len(found)} files data.pkl in the archive")
    folder = found[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and read_archive_file(archive, f"{folder}byteorder", 16) != b"little":
        raise pickle.UnpicklingError("its numbers are not little-endian")
    return folder


def read_archive_file(archive: zipfile.ZipFile, name: str, max_bytes: int | None = None) -> bytes:
    """Return a file of the archive, with its checksum verified.

    PyTorch compresses no pickle and no tensor, so that none is larger than it looks.

    Raises UnpicklingError for one that is compressed, or of more bytes than `max_bytes`; KeyError if there is none.
    """
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or (max_bytes is not None and info.file_size > max_bytes):
        raise pickle.UnpicklingError(f"{name} is compressed, or of {info.file_size} bytes")
    return archive.read(info)
