"""List folders of weights, and report those that can't be read. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble.config import files_below
from ensemble.errors import WeightsBroken
from ensemble.files import describe_folder, is_permission_error, unreadable_reason


def weights_files(folder: Path) -> tuple[Path, ...]:
    """Return all files below a folder, sorted; empty if the folder does not exist.

    Raises WeightsBroken if anything in it can't be read: nothing is silently skipped.
    """
    with convert_folder_errors(folder):
        if not folder.is_dir():
            return ()
        files = sorted(files_below(folder, hidden=True))
        for path in {path.parent: path for path in files}.values():
            path.lstat()  # a folder may be listed, and not entered
        return tuple(files)


@contextmanager
def convert_folder_errors(folder: Path) -> Iterator[None]:
    """Convert file-system errors in the block into WeightsBroken, naming what can't be read."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or folder)
        why = unreadable_reason(where, error)
        rights = (
            "give this user read access to the weights folder (chmod -R a+rX), or remove the files that are not weights"
        )
        raise WeightsBroken(
            "a file or folder of the weights can't be read",
            where=where,
            found=why.said,
            do=rights if is_permission_error(error) else why.do,
        ) from error


def describe_weights_folder(folder: Path) -> str:
    """Return the first names in a folder, for messages. Raises WeightsBroken if it can't be read."""
    with convert_folder_errors(folder):
        if not folder.is_dir():
            return "no such folder"
        return describe_folder(folder)
