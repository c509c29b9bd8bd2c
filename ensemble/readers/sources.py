"""The files that an image consists of, and whether they are still the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ensemble.readers.headers import text_header
from ensemble.readers.names import stem

#: What tells a file from another in its place: inode, size, time of change.
Stamp = tuple[int, int, int]


def source_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Files that an image consists of, with their names below its folder.

    That is the file itself, with its b-values (FSL's .bval) and the data file that its header names, where there are such; or all of a
    folder.
    """
    if path.is_dir():
        for folder, _, names in sorted(os.walk(path)):
            yield from ((Path(folder, name).relative_to(path).as_posix(), Path(folder, name)) for name in sorted(names))
        return
    yield path.name, path
    if (b_values := path.with_name(stem(path) + ".bval")).is_file():
        yield b_values.name, b_values
    header = text_header(path) if path.suffix.lower() in (".mhd", ".nhdr") and path.is_file() else None
    if header is not None and header.data_file and (data := path.parent / header.data_file).is_file():
        yield header.data_file, data


def stamps(images: Iterable[Path]) -> dict[Path, Stamp | None]:
    """The stamp of each file of these images: changes when one is replaced, written to, added or removed."""
    return {file: stamp(file) for image in images for _, file in source_files(image)}


def stamp(path: Path) -> Stamp | None:
    """None when nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
