"""The output folder from one call of the server to the next: it holds the outputs of the last call, all of them, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

from ensemble.readers.sources import Stamp, stamp


class OutputFolder:
    """Knows which files under the output root came from us. Whatever else lies there is left alone."""

    def __init__(self) -> None:
        self._root = Path()
        self._root_existed = True
        self._before: set[Path] = set()
        self._ours: dict[Path, Stamp] = {}

    def begin(self, root: Path) -> None:
        """Before a call: take away what the last call left, unless someone has exchanged it; it belongs to another case.

        The platform has emptied the folder by then; others may not, and would find an old mask beside the answer "failed".
        """
        for path, left in self._ours.items():
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif stamp(path) == left:
                path.unlink()
        self._ours = {}
        self._root, self._root_existed, self._before = root, root.exists(), set(root.rglob("*"))

    def keep(self) -> None:
        """After a call that ended well: what has come is ours."""
        self._ours = {path: left for path in self._new() if (left := stamp(path)) is not None}

    def restore(self) -> None:
        """After a call that failed: remove what has come; there is something if the process that wrote it was killed."""
        for path in self._new():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not self._root_existed:
            shutil.rmtree(self._root, ignore_errors=True)

    def _new(self) -> list[Path]:
        """What has come since `begin`, deepest first."""
        return sorted(set(self._root.rglob("*")) - self._before, key=lambda path: -len(path.parts))
