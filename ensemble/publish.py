"""Make all outputs of a case appear together at the end, or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ensemble.config import STAGING
from ensemble.folders import remove_empty_folders, unwritable_error
from ensemble.text import replace_undecodable


@contextmanager
def publish(root: Path, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty staging folder; if the block succeeds, move its files to the same paths under `root`.

    The staging folder lies inside `root` (moves within one file system are atomic). Files move in the order of their names, deeper
    ones first and JSON at the top last, so that what tells of the rest comes after it; SIGTERM and SIGINT meanwhile undo it all. The
    files that `replaces` names, relative to `root`, belong to an earlier case and go in the same step. When the block raises, or a move
    fails, `root` is left as it was found, folders included. Raises UsageError when something can't be written.
    """
    made: list[Path] = []
    staging = root  # until there is one
    try:
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
        yield staging
        with _signals_held() as held:
            _move_all(staging, root, replaces, held)
    except OSError as error:
        raise unwritable_error(root, error) from error
    finally:
        with _signals_held():
            if staging != root:
                shutil.rmtree(staging, ignore_errors=True)
            remove_empty_folders(made)


@contextmanager
def publish_folder(target: Path, scratch: Path) -> Iterator[Path]:
    """Yield an empty folder; if the block succeeds, move it to `target`, complete and on disk, replacing what was there.

    `scratch` is a folder for unfinished files on the same file system. At any moment, even if the machine stops, `target` is what it
    was, absent, or complete. When the block raises, it is what it was. Raises UsageError when something can't be written.
    """
    staging = scratch  # until there is one
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="unfinished-", dir=scratch))
        (new := staging / "new").mkdir()  # with the usual permissions, unlike mkdtemp
        yield new
        for path in (*new.rglob("*"), new):
            flush_to_disk(path)
        with _signals_held():
            made = [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(staging / "old")
            try:
                new.rename(target)
            except BaseException:
                if (staging / "old").exists():
                    (staging / "old").rename(target)
                remove_empty_folders(made)
                raise
            for folder in {target.parent, *(folder.parent for folder in made)}:
                flush_to_disk(folder)
    except OSError as error:
        raise unwritable_error(target, error) from error
    finally:
        if staging != scratch:
            shutil.rmtree(staging, ignore_errors=True)


def write_text_atomically(path: Path, text: str, scratch: Path) -> None:
    """Write a text file atomically, by way of `scratch`. Raises OSError."""
    write_bytes_atomically(path, replace_undecodable(text).encode(), scratch)


def write_bytes_atomically(path: Path, content: bytes, scratch: Path) -> None:
    """Write a file atomically, by way of `scratch`. Raises OSError."""
    draft = scratch / f"{path.name}.{uuid4()}"  # containers that share a folder have the same process ids
    try:
        draft.write_bytes(content)
        flush_to_disk(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk (fsync).

    For a folder, failure is ignored: some network file systems do not support it. Raises OSError for a file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_writable(root: Path) -> None:
    """Raise UsageError if outputs can't be published under `root`. Called before time is spent; leaves `root` unchanged."""
    with publish(root):
        pass


def write_json(content: Any, path: Path) -> None:
    """Write strict JSON (no NaN), indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _move_all(staging: Path, root: Path, replaces: Iterable[str], held: Sequence[int]) -> None:
    """Move every file, keeping replaced files until all have arrived; undo everything on failure or on a signal."""
    files = sorted(
        (path for path in staging.rglob("*") if path.is_file()),
        key=lambda path: (-len(path.parts), path.suffix == ".json", path.name),
    )
    targets = [root / source.relative_to(staging) for source in files]
    if folders := [target for target in targets if target.is_dir()]:
        raise IsADirectoryError(errno.EISDIR, "there is a folder where a file must be written", str(folders[0]))
    stale = [path for path in (root / place for place in replaces) if path.is_file() and path not in targets]
    kept = Path(tempfile.mkdtemp(prefix=".replaced-", dir=staging))
    put_aside: list[tuple[Path, Path]] = []
    arrived: list[Path] = []
    made: list[Path] = []
    try:
        for number, target in enumerate([*targets, *stale]):
            if target.exists():
                put_aside.append((kept / str(number), target))
                target.replace(kept / str(number))
        for source, target in zip(files, targets, strict=True):
            made += [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            arrived.append(target)
            source.replace(target)
        if held:
            raise _Stopped
    except BaseException:
        for target in arrived:
            target.unlink(missing_ok=True)
        for copy, target in put_aside:
            if copy.exists():
                copy.replace(target)
        remove_empty_folders(made)
        raise


class _Stopped(Exception):
    """A signal arrived while files moved. It is delivered in place of this exception."""


@contextmanager
def _signals_held() -> Iterator[Sequence[int]]:
    """Delay SIGTERM and SIGINT until the block ends, so that it is not interrupted; yields the signals that arrived.

    Handlers are exchanged, since a mask would only keep signals from this thread. Elsewhere than in the main thread, the only one in
    which Python handles signals, there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield ()
        return
    held: list[int] = []
    handlers = {
        number: signal.signal(number, lambda got, _: held.append(got))
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield held
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])
