"""Locks that let several processes, on one or several machines, share an output folder without working on the same case.

Locks are `flock`s on files in `.batch/`, so that the system releases the locks of a process however it dies. `.batch/` also holds
unfinished results and the failures of the present session. A session lasts while at least one process works on the folder: the first
process cleans up after an earlier session, and the last one removes `.batch/`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.publish import write_text_atomically

HIDDEN = ".batch"


@dataclass(frozen=True)
class FileLock:
    """A file lock, held until it is released or the process ends."""

    descriptor: int


class BatchClaims:
    """The cases that this process has claimed in an output folder, and what other processes have finished there."""

    def __init__(self, root: Path, recipe_key: str) -> None:
        """Join the session on `root`; if no other process is there, clean up after an earlier session. Raises OSError.

        Records are shared only with processes of the same `recipe_key`, since with other weights or options a case may succeed.
        """
        self.folder = root / HIDDEN
        self._notes = self.folder / f"notes-{recipe_key[:16]}"
        self._held: set[FileLock] = set()
        self._presence = self._join()

    def claim(self, entities: BidsEntities) -> FileLock | None:
        """Lock a case for this process; None while another process holds it."""
        lock = _lock(self.folder / "locks" / f"{entities.prefix}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            self._held.add(lock)
        return lock

    def release(self, lock: FileLock) -> None:
        """Release the lock of a case."""
        self._held.discard(lock)
        os.close(lock.descriptor)

    def note_done(self, entities: BidsEntities) -> None:
        """Tell the other processes of this session that a case is done."""
        path = self._notes / f"{entities.prefix}.done"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def is_done(self, entities: BidsEntities) -> bool:
        """Return whether a case was done in this session."""
        return (self._notes / f"{entities.prefix}.done").exists()

    def note_failure(self, entities: BidsEntities, failure: dict[str, Any]) -> None:
        """Tell the other processes of this session that a case failed."""
        path = self._notes / f"{entities.prefix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(failure), path.parent)

    def failure(self, entities: BidsEntities) -> dict[str, Any] | None:
        """Return the failure recorded for a case in this session; None if there is none."""
        with suppress(OSError, ValueError):
            noted: dict[str, Any] = json.loads((self._notes / f"{entities.prefix}.json").read_text())
            return noted
        return None

    def leave(self) -> None:
        """Release all locks. The last process to leave removes the hidden folder."""
        for lock in list(self._held):
            self.release(lock)
        with suppress(OSError):
            fcntl.flock(self._presence.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the lock file is removed last, then the folder; a process that opens it in between notices (see _lock)
            for path in self.folder.iterdir():
                if path.name != "session.lock":
                    _remove(path)
            (self.folder / "session.lock").unlink()
            self.folder.rmdir()
        os.close(self._presence.descriptor)

    def _join(self) -> FileLock:
        path = self.folder / "session.lock"
        if alone := _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for left in self.folder.iterdir():
                if left != path:
                    _remove(left)
            # `flock` can't turn an exclusive lock into a shared one in a single step, so there is no use in keeping it
            os.close(alone.descriptor)
        lock = _lock(path, fcntl.LOCK_SH)
        assert lock is not None, "a blocking lock is always acquired"
        return lock


def _lock(path: Path, how: int) -> FileLock | None:
    """Lock a file, creating it if needed; None if another process holds it and `how` says not to wait."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            fcntl.flock(descriptor, how)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return FileLock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was taken away between opening and locking: the lock is on nothing


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
