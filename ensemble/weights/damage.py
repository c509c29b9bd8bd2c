"""The exceptions that damaged or hostile weight files cause, and the errors that users see instead. Imports no torch."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble.errors import WeightsBroken
from ensemble.files import error_in_words, size_in_words
from ensemble.memory import MORE_MEMORY, is_out_of_memory

#: What readers of pickles, archives and tensors say of bytes that make no sense.
READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,  # NotImplementedError and RecursionError among them
    EOFError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
)


def damaged_weights_error(path: Path, what: str, doing: str, error: BaseException, found: str = "") -> WeightsBroken:
    """Return the error for a file (`what`: "a checkpoint") that could not be read (`doing`: "load").

    `found` is the error by default.
    """
    if is_out_of_memory(error):
        found = size_in_words(path)
        return WeightsBroken(f"there is not enough memory to {doing} {what}", where=path, found=found, do=MORE_MEMORY)
    return WeightsBroken(
        f"{what} is damaged",
        where=path,
        found=found or error_in_words(error)[:200],
        do="copy or download it again",
    )


@contextmanager
def convert_weights_errors(path: Path, what: str, doing: str) -> Iterator[None]:
    """Convert the exceptions of reading a damaged file into WeightsBroken."""
    try:
        yield
    except READ_ERRORS as error:
        raise damaged_weights_error(path, what, doing, error) from error
