"""Read untrusted files: only regular ones, only up to a size limit, with a clear reason for each failure."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused
from ensemble.memory import MORE_MEMORY

#: More than any description of a model, of a data set or of a run; a longer one is none.
MAX_JSON_BYTES = 32 << 20
_MAX_NAMES = 8
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)
_RIGHTS = (errno.EACCES, errno.EPERM)
_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN)
_FETCH = "fetch the content that the link stands for (git annex get, datalad get), or give the file itself"


class NotARegularFile(OSError):
    """The path is not a regular file: reading it might block or never end."""


@dataclass(frozen=True)
class UnreadableReason:
    """Why a file can't be read, for messages."""

    what: str
    """The end of a sentence that begins with what the file is."""
    found: str
    do: str

    @property
    def said(self) -> str:
        """What is wrong and what was found, in one string."""
        return f"it {self.what}: {self.found}" if self.found else f"it {self.what}"


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; links are followed. Raises NotARegularFile, or another OSError."""
    refuse_irregular_file(path)
    return path.open("rb")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_irregular_file(path: Path) -> None:
    """Raise NotARegularFile if the path exists but is not a regular file; OSError if it does not exist."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name, as a table may hold
        raise OSError(errno.EINVAL, "not a valid file name", str(path)) from error
    if not stat.S_ISREG(mode):
        kind = next((name for has_kind, name in _KINDS if has_kind(mode)), "no file")
        raise NotARegularFile(errno.EINVAL, f"{kind}, not a file", str(path))


def lexists(path: Path) -> bool:
    """Return whether the path exists; a dangling symbolic link counts (as in `os.path.lexists`)."""
    return os.path.lexists(path)


def missing_link_target(path: Path) -> str:
    """Return the missing target of a symbolic link because of which a path does not exist; empty if there is no such link."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):  # noqa: PTH110, PTH114 (Path's raise where rights are lacking)
            return os.fspath(place.readlink())
    return ""


def is_permission_error(error: OSError) -> bool:
    """Return whether an error is due to missing permissions."""
    return error.errno in _RIGHTS


def unreadable_reason(path: Path, error: OSError) -> UnreadableReason:
    """Return why a file can't be read. Permissions are named only if they are the cause."""
    user, said = f"(we run as user {os.getuid()})", error.strerror or str(error) or type(error).__name__
    if isinstance(error, NotARegularFile):
        return UnreadableReason("is not a regular file", said, "give a regular file")
    if error.errno == errno.ELOOP:
        return UnreadableReason("is a circular link", said, "give the file itself")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if target := missing_link_target(path):
            return UnreadableReason("is a link to a file that does not exist", f"it points to {target}", _FETCH)
        return UnreadableReason("does not exist", "", "check the path")
    if is_permission_error(error):
        do = "give this user permission to read it and to enter its parent folders"
        return UnreadableReason("can't be opened", f"{said} {user}", do)
    if error.errno == errno.ENOMEM:
        return UnreadableReason("does not fit into memory", said, MORE_MEMORY)
    if error.errno == errno.ENAMETOOLONG:
        return UnreadableReason("can't be opened", said, "give it a shorter name")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UnreadableReason("can't be opened", said, "raise the limit of open files (ulimit -n)")
    if error.errno in _DISK:
        return UnreadableReason("can't be read", said, "check its disk or network share, and try again")
    return UnreadableReason("can't be read", said, "copy it elsewhere, and try again")


def cannot_open_error(subject: str, path: Path, error: OSError) -> InputRefused:
    """Return the error for an input file (`subject`: "the DWI image") that an OSError kept from being read."""
    why = unreadable_reason(path, error)
    return InputRefused(f"{subject} {why.what}", where=path, found=why.found, do=why.do)


def error_in_words(error: BaseException) -> str:
    """Return the text of an exception for a message: without the class name, and never empty."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: byte {error.start} is invalid"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"no entry {error}"
    if isinstance(error, EOFError):
        return "it ends too early"
    return str(error).strip() or type(error).__name__


def size_in_words(*paths: Path) -> str:
    """Return the size of files, for messages about memory; empty if it can't be read."""
    try:
        return f"{sum(path.stat().st_size for path in paths) / 1e6:.0f} MB on disk"
    except OSError:
        return ""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file. Raises OSError, and ValueError if it has more than `max_bytes`."""
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    return content


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file. Raises OSError, and ValueError if it is not JSON, too long or too deeply nested."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES).decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON text. Raises ValueError if it is not JSON or too deeply nested."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def describe_folder(folder: Path) -> str:
    """Return the first names in a folder, for messages. Raises OSError."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:_MAX_NAMES]) + (" ..." if len(names) > _MAX_NAMES else "") or "an empty folder"
