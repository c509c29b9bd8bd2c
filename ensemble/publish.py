"""All outputs of a case appear together, at the end, or none does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ensemble.errors import UsageError
from ensemble.volume import Volume, from_sitk, to_sitk


@contextmanager
def publish(root: Path) -> Iterator[Path]:
    """Give an empty staging folder; when the block ends well, move what was written there to the same places under `root`.

    The staging folder lies inside `root` (moves within one file system are atomic). Files are moved in the order of their names
    after the deeper ones, so a summary at the top appears last. When the block raises, or a move fails, `root` is left as it was found,
    folders included.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(
            "the output folder can't be written", where=root, found=str(error), do="check its permissions"
        ) from error
    try:
        yield staging
        _move_all(staging, root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def write_volume(volume: Volume, path: Path) -> None:
    """Write a volume, compressed, with geometry and nothing else in its header; then read it back, since a full disk can go unnoticed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = to_sitk(volume)
    sitk.WriteImage(image, str(path), useCompression=True)
    if not np.array_equal(from_sitk(sitk.ReadImage(str(path))).array, sitk.GetArrayViewFromImage(image)):
        raise OSError(f"{path.name} does not read back as it was written: is the disk full?")


def write_json(content: Any, path: Path) -> None:
    """Write strict JSON (no NaN), indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _move_all(staging: Path, root: Path) -> None:
    """Move every file, keeping what it replaces until all have arrived; undo on failure."""
    files = sorted(
        (path for path in staging.rglob("*") if path.is_file()), key=lambda path: (-len(path.parts), path.name)
    )
    kept = Path(tempfile.mkdtemp(prefix=".replaced-", dir=staging))
    arrived: list[Path] = []
    made: list[Path] = []
    try:
        for number, source in enumerate(files):
            target = root / source.relative_to(staging)
            made += [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.replace(kept / str(number))
            arrived.append(target)
            source.replace(target)
    except BaseException:
        for number, target in enumerate(arrived):
            target.unlink(missing_ok=True)
            if (kept / str(number)).exists():
                (kept / str(number)).replace(target)
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that we made and that hold nothing, deepest first."""
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
