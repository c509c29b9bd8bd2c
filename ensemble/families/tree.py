"""A weights folder and all files below it, listed once for all families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ensemble.families.names import member_name_from_path
from ensemble.weights.folder import weights_files


@dataclass(frozen=True)
class WeightsTree:
    """A weights folder and all its files, listed once for every family to look through."""

    root: Path
    files: tuple[Path, ...]
    """Sorted."""

    @classmethod
    def read(cls, root: Path) -> WeightsTree:
        """List a folder. Raises WeightsBroken if a folder in it can't be read."""
        return cls(root, weights_files(root))

    def named(self, name: str) -> list[Path]:
        """Return the files with a given name."""
        return [path for path in self.files if path.name == name]

    def folders_with(self, name: str) -> set[Path]:
        """Return the folders that contain a file with a given name."""
        return {path.parent for path in self.named(name)}

    def name_of(self, folder: Path) -> str:
        """Return the member name made from a folder's path."""
        return member_name_from_path(
            self.root.resolve().name if folder == self.root else folder.relative_to(self.root).as_posix()
        )
