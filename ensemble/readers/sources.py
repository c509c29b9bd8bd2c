"""The files that an image consists of, and whether they have changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ensemble.files import lexists
from ensemble.readers.headers import read_text_header
from ensemble.readers.names import ARCHIVE, SLICE_SUFFIXES, stem

#: Identifies a file's content: inode, size, time of change.
Stamp = tuple[int, int, int]


def source_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files that an image consists of, with their names relative to its folder.

    That is the file itself, with its b-values (FSL's .bval) and the data file that its header names, where there are such; or all of a
    folder.
    """
    if path.is_dir():
        for folder, _, names in sorted(os.walk(path)):
            files = (Path(folder, name) for name in sorted(names))
            yield from ((file.relative_to(path).as_posix(), file) for file in files if file.is_file())
        return
    yield path.name, path
    if lexists(b_values := path.with_name(stem(path) + ".bval")):
        yield b_values.name, b_values
    header = read_text_header(path) if path.suffix.lower() in (".mhd", ".nhdr") and path.is_file() else None
    if header is not None and header.data_file and not header.leads_out:
        data = path.parent / header.data_file
        if lexists(data):
            yield header.data_file, data


def may_have_b_values(dwi: Path) -> bool:
    """Return whether a DWI may come with b-values, judging by its name: DICOM, or an image file with its .bval.

    Without b-values no ADC can be computed.
    """
    dicom = dwi.suffix.lower() in (ARCHIVE, *SLICE_SUFFIXES) or os.path.isdir(dwi)  # noqa: PTH112 (Path.is_dir raises for some names)
    return dicom or lexists(dwi.with_name(stem(dwi) + ".bval"))


def link_notes(path: Path, label: str) -> list[str]:
    """Return notes on links through which an image is read, if they lead out of its folder.

    Those of git-annex and DataLad, which keep the content of files in a store of the data set, are not mentioned.
    """
    if path.is_symlink() and _leaves(path, path.parent):
        return [f"{label}: read through a link to {real_path(path)}"]
    folder = path if path.is_dir() else path.parent
    files = [file for _, file in source_files(path)]
    leaving = [file for file in files if file.is_symlink() and _leaves(file, folder)]
    if not leaving:
        return []
    return [
        f"{label}: {len(leaving)} of its files are links to outside its folder, the first to {real_path(leaving[0])}"
    ]


def _leaves(path: Path, folder: Path) -> bool:
    real = real_path(path)
    return not real.is_relative_to(real_path(folder)) and not is_in_git_annex(real)


def real_path(path: Path) -> Path:
    """Return the target of a path with all links followed; a circular link is returned as it is."""
    return Path(os.path.realpath(path))


def is_in_git_annex(real: Path) -> bool:
    """Return whether a file's real path is in a git-annex store."""
    return ".git" in real.parts and ("annex", "objects") in zip(real.parts, real.parts[1:], strict=False)


def image_stamps(images: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Return the stamp of each file of these images. It changes when a file is replaced, written to, added or removed."""
    return {file: file_stamp(file) for image in images for _, file in source_files(image)}


def file_stamp(path: Path) -> Stamp | None:
    """Return inode, size and modification time (ns) of a file; None if it does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
