"""The output folder from one call of the server to the next: it holds the outputs of the last call, all of them, or none."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePath

from ensemble.config import STAGING
from ensemble.folders import remove_empty_folders
from ensemble.outputs.layouts.contract import patterns
from ensemble.readers.sources import Stamp, stamp


class OutputFolder:
    """Knows which of the outputs under its root came from our calls. Whatever else lies there is left alone."""

    def __init__(self) -> None:
        self._root = Path()
        self._folders: set[Path] = set()
        self._before: dict[Path, Stamp | None] = {}
        self._ours: dict[Path, Stamp | None] = {}

    def begin(self, root: Path) -> None:
        """Before a call: take away what the last call left, unless someone has exchanged it; it belongs to another case.

        The platform has emptied the folder by then; others may not, and would find an old mask beside the answer "failed".
        """
        for path, left in self._ours.items():
            if stamp(path) == left:
                path.unlink(missing_ok=True)
        if self._ours:
            self._remove_empty()
        self._ours, self._root = {}, root
        self._folders = {root, *(path for path in root.rglob("*") if path.is_dir())} if root.is_dir() else set()
        self._before = self._outputs()

    def keep(self) -> None:
        """After a call that ended well: outputs that have come, or were replaced, are ours."""
        self._ours = {path: now for path, now in self._outputs().items() if self._before.get(path) != now}

    def restore(self) -> None:
        """After a call that failed: remove what has come; there is something if the process that wrote it was killed."""
        for path in self._root.glob(STAGING + "*"):
            if path not in self._folders:
                shutil.rmtree(path, ignore_errors=True)
        for path in set(self._outputs()) - set(self._before):
            path.unlink(missing_ok=True)
        self._remove_empty()

    def _outputs(self) -> dict[Path, Stamp | None]:
        return {path: stamp(path) for pattern in patterns() for path in self._root.glob(pattern) if path.is_file()}

    def _remove_empty(self) -> None:
        """Remove the folders that outputs needed, as far as they were not there and are empty."""
        needed = {self._root / folder for pattern in patterns() for folder in PurePath(pattern).parents}
        remove_empty_folders(list(needed - self._folders))
