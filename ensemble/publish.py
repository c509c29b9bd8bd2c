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

    The staging folder lies inside `root` (moves within one file system are atomic). Files move in the order of their names, deeper
    ones first, so that a summary at the top appears last. When the block raises, or a move fails, `root` is left as it was found,
    folders included. Raises UsageError when something can't be written.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    staging = root  # until there is one
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
        yield staging
        _move_all(staging, root)
    except OSError as error:
        found = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        raise UsageError(
            "the outputs can't be written",
            where=root,
            found=found,
            do="check permissions and free space of the output folder",
        ) from error
    finally:
        if staging != root:
            shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def write_volume(volume: Volume, path: Path) -> None:
    """Write a volume, compressed, with geometry and nothing else in its header; read it back, since a full disk can go unnoticed.

    Raises OSError when the file does not hold what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = to_sitk(volume)
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        back = from_sitk(sitk.ReadImage(str(path))).array
    except RuntimeError as error:
        raise OSError(f"{path.name} could not be written: {str(error).splitlines()[-1].strip()}") from error
    if not np.array_equal(back, sitk.GetArrayViewFromImage(image)):
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
