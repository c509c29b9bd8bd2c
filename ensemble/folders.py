"""Output folders: a lock for one writer at a time, and errors about folders that can't be written."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.memory import MORE_MEMORY

log = logging.getLogger(__name__)

#: What file systems say that know no locks, or none on folders (NFS).
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

#: What keeps outputs from being written, and what to do about it.
_REMEDIES: tuple[tuple[tuple[int, ...], str], ...] = (
    (
        (errno.EACCES, errno.EPERM),
        "give this user write permission, or run as the owner of the folder (docker run --user)",
    ),
    ((errno.EROFS,), "mount the folder writable, or choose another one"),
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make free space there, or choose another folder"),
    ((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "move the file in its place away, or choose another folder"),
    ((errno.ELOOP,), "give the folder itself, not a circular link"),
    ((errno.ENAMETOOLONG,), "give a folder with a shorter path, or shorter names"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    ((errno.ENOMEM,), MORE_MEMORY),
    (
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
        "check the disk or network share, and try again",
    ),
)


@contextmanager
def exclusive_writer(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock `root` against other writers for the duration of the block. A folder created for it is removed if it stays empty.

    Callers with `shared` allow each other in: batches divide the cases among themselves.

    The lock is a `flock` on the folder itself: it leaves no file, works for every path and in every container that mounts the folder,
    and ends with the process. If the file system does not support locks, that is logged. Raises UsageError when another
    process holds it, or when the folder can't be created.
    """
    made: list[Path] = []
    try:
        descriptor = _locked_folder(root, made, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BlockingIOError as error:
        raise UsageError(
            "another process is writing to the output folder",
            where=root,
            found="it is locked",
            do="use a separate folder for each run, or wait until the other run has ended",
        ) from error
    except OSError as error:
        raise unwritable_error(root, error) from error
    try:
        yield
    finally:
        remove_empty_folders(made)
        os.close(descriptor)


def _locked_folder(root: Path, made: list[Path], how: int) -> int:
    """Create a folder if needed (recording it and its new parents in `made`) and lock it. Raises BlockingIOError if locked."""
    while True:
        made += [folder for folder in (root, *root.parents) if not folder.exists() and folder not in made]
        root.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the process that created it has removed it
            continue
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), root.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # taken away between opening and locking: the lock is on nothing
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.info(
                    "note: %s can't be locked (%s): make sure that no other process writes there", root, error.strerror
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def unwritable_error(root: Path, error: OSError) -> UsageError:
    """Return the error for outputs that can't be written. Permissions are named only if they are the cause."""
    found = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    if error.errno in (errno.EACCES, errno.EPERM):
        found += f" (we run as user {os.getuid()})"
    do = next((do for numbers, do in _REMEDIES if error.errno in numbers), "try another output folder")
    return UsageError("the outputs can't be written", where=root, found=found, do=do)


def remove_empty_folders(folders: list[Path]) -> None:
    """Remove those of the given folders that are empty, deepest first."""
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
