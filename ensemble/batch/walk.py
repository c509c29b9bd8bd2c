"""Walk the folders of a dataset, and find those that should hold a case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ensemble.batch.layouts import FoundCase
from ensemble.errors import InputRefused
from ensemble.files import read_json, unreadable_reason

#: Folders that are no cases, of a BIDS dataset and of nnU-Net's; and nnU-Net's image folders, which hold many cases.
_NO_CASES = {"derivatives", "sourcedata", "code", "stimuli", "phenotype", "labelsTr", "labelsTs"}
_POOLS = {"imagesTr", "imagesTs"}


def walk(root: Path, out: Path, unreadable: list[OSError]) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and the names in them. Links are followed, but no folder is entered twice.

    Hidden folders and those that hold no cases are not entered.
    """
    entered: set[str] = set()
    for top, inner, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        folder = Path(top)
        if (real := os.path.realpath(top)) in entered or (folder != root and _is_derivative(folder)):
            inner.clear()
            continue
        entered.add(real)
        inner[:] = sorted(
            name for name in inner if not name.startswith(".") and name not in _NO_CASES and folder / name != out
        )
        yield folder, sorted(name for name in names if not name.startswith("."))


def _is_derivative(folder: Path) -> bool:
    """Return whether a folder's description says that it holds derivatives, for example earlier results of this program."""
    try:
        described = read_json(folder / "dataset_description.json")
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("DatasetType") == "derivative"


def case_folders(root: Path, folders: Iterable[Path]) -> Iterator[Path]:
    """Yield folders that should hold a case: sessions and subjects of a BIDS tree, else all folders directly below the root."""
    inner = [folder for folder in folders if folder != root]
    subjects = [folder for folder in inner if folder.name.startswith("sub-")]
    sessions = [folder for folder in inner if folder.name.startswith("ses-") and folder.parent in subjects]
    yield from sessions
    yield from (folder for folder in subjects if folder not in {session.parent for session in sessions})
    if not subjects:
        yield from (folder for folder in inner if folder.parent == root and not _is_empty_pool(folder))


def _is_empty_pool(folder: Path) -> bool:
    return folder.name in _POOLS and not any(folder.iterdir())


def unreadable_folder_case(error: OSError, root: Path) -> FoundCase:
    """Return an unreadable folder as a case with a problem. Raises the error if it is the root."""
    folder = Path(error.filename)
    if folder == root:
        raise error
    why = unreadable_reason(folder, error)
    refused = InputRefused(
        "the folder can't be read",
        where=folder,
        found=why.said,
        do=why.do,
    )
    return FoundCase(folder.relative_to(root).as_posix(), problem=refused)
