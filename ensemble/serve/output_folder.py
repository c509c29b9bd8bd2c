"""The output folder between server calls: it holds all outputs of the last call, or none."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePath

from ensemble.config import STAGING
from ensemble.folders import remove_empty_folders
from ensemble.outputs.layouts.contract import output_patterns
from ensemble.readers.sources import Stamp, file_stamp


class OutputFolder:
    """Records which outputs under its root are from our calls. All other files are left alone."""

    def __init__(self) -> None:
        self._root = Path()
        self._folders: set[Path] = set()
        self._before: dict[Path, Stamp | None] = {}
        self._ours: dict[Path, Stamp | None] = {}

    def begin(self, root: Path) -> None:
        """Before a call: remove the outputs of the last call, because they belong to another case; files replaced since are kept.

        The platform empties the folder between calls; other callers may not, and could find an old mask beside the answer "failed".
        """
        for path, left in self._ours.items():
            if file_stamp(path) == left:
                path.unlink(missing_ok=True)
        if self._ours:
            self._remove_empty()
        self._ours, self._root = {}, root
        self._folders = {root, *(path for path in root.rglob("*") if path.is_dir())} if root.is_dir() else set()
        self._before = self._outputs()

    def keep(self) -> None:
        """After a successful call: record new and replaced outputs as ours."""
        self._ours = {path: now for path, now in self._outputs().items() if self._before.get(path) != now}

    def restore(self) -> None:
        """After a failed call: remove new outputs, which a killed process may have left."""
        for path in self._root.glob(STAGING + "*"):
            if path not in self._folders:
                shutil.rmtree(path, ignore_errors=True)
        for path in set(self._outputs()) - set(self._before):
            path.unlink(missing_ok=True)
        self._remove_empty()

    def _outputs(self) -> dict[Path, Stamp | None]:
        return {
            path: file_stamp(path)
            for pattern in output_patterns()
            for path in self._root.glob(pattern)
            if path.is_file()
        }

    def _remove_empty(self) -> None:
        """Remove empty folders that were created for outputs."""
        needed = {self._root / folder for pattern in output_patterns() for folder in PurePath(pattern).parents}
        remove_empty_folders(list(needed - self._folders))
