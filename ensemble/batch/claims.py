"""Locks that let several processes, on one or several machines, share an output folder without working on the same case.

Locks are `flock`s on files in `.batch/`, so that the system releases those of a process that dies in whatever way. `.batch/` also holds
unfinished results and the failures of this session, a session being the time in which at least one process is there: the first one
to come cleans up, the last one to go takes the folder away.
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
from ensemble.publish import replace_text

HIDDEN = ".batch"


@dataclass(frozen=True)
class FileLock:
    """A file lock, held until it is released or the process ends."""

    descriptor: int


class BatchClaims:
    """The cases that this process has claimed in an output folder, and what other processes have finished there."""

    def __init__(self, root: Path, recipe_key: str) -> None:
        """Join those who work on `root`; clean up after an earlier session if there is nobody. Raises OSError.

        What is noted counts for processes with the same `recipe_key`: with other weights or options a case may well succeed.
        """
        self.folder = root / HIDDEN
        self._notes = self.folder / f"notes-{recipe_key[:16]}"
        self._held: set[FileLock] = set()
        self._presence = self._join()

    def claim(self, place: BidsEntities) -> FileLock | None:
        """Lock a case for this process; None while another process has it."""
        lock = _lock(self.folder / "locks" / f"{place.prefix}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            self._held.add(lock)
        return lock

    def release(self, lock: FileLock) -> None:
        """Release the lock of a case."""
        self._held.discard(lock)
        os.close(lock.descriptor)

    def note_done(self, place: BidsEntities) -> None:
        """Tell the other processes of this session that a case is done."""
        path = self._notes / f"{place.prefix}.done"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def is_done(self, place: BidsEntities) -> bool:
        """Return whether a case was done in this session."""
        return (self._notes / f"{place.prefix}.done").exists()

    def note_failure(self, place: BidsEntities, failure: dict[str, Any]) -> None:
        """Tell the other processes of this session that a case failed."""
        path = self._notes / f"{place.prefix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(failure), path.parent)

    def failure(self, place: BidsEntities) -> dict[str, Any] | None:
        """Return the failure recorded for a case in this session; None if there is none."""
        with suppress(OSError, ValueError):
            noted: dict[str, Any] = json.loads((self._notes / f"{place.prefix}.json").read_text())
            return noted
        return None

    def leave(self) -> None:
        """Release all locks. The last process to leave removes the hidden folder."""
        for lock in list(self._held):
            self.release(lock)
        with suppress(OSError):
            fcntl.flock(self._presence.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the lock's own file goes last, and with it the folder: whoever opens it in between finds out (see _lock)
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
            os.close(
                alone.descriptor
            )  # `flock` can't turn an exclusive lock into a shared one in one step, so nothing is won by keeping it
        lock = _lock(path, fcntl.LOCK_SH)
        assert lock is not None, "a lock that is waited for is had"
        return lock


def _lock(path: Path, how: int) -> FileLock | None:
    """Lock a file, creating it if needed; None if another process holds it and `how` says not to wait."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder went away in between
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
