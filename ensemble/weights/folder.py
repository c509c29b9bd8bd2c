"""Folders of weights: all files below one, and what to say where it can't be read. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble.config import files_below
from ensemble.errors import WeightsBroken
from ensemble.files import first_names, is_permission_error, unreadable_reason


def files_of(folder: Path) -> tuple[Path, ...]:
    """Return every file below a folder, sorted; none where there is no folder.

    Raises WeightsBroken where anything in it can't be read: nothing is passed over in silence.
    """
    with folder_errors(folder):
        if not folder.is_dir():
            return ()
        files = sorted(files_below(folder, hidden=True))
        for path in {path.parent: path for path in files}.values():
            path.lstat()  # a folder may be listed, and not entered
        return tuple(files)


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into WeightsBroken, naming what can't be read."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or folder)
        why = unreadable_reason(where, error)
        rights = "let this user read the weights folder and all that lies in it (chmod -R a+rX), or take out what is no weights"
        raise WeightsBroken(
            "a file or folder of the weights can't be read",
            where=where,
            found=why.said,
            do=rights if is_permission_error(error) else why.do,
        ) from error


def listing(folder: Path) -> str:
    """Return the first names in a folder, for messages. Raises WeightsBroken where it can't be read."""
    with folder_errors(folder):
        if not folder.is_dir():
            return "no such folder"
        return first_names(folder)
