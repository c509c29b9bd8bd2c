"""Networks of DeepISLES' archive that are known by their folder, and can't be used yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ensemble.families.base import Unsupported
from ensemble.families.tree import WeightsTree


@dataclass(frozen=True)
class Recognised:
    """The networks of one team."""

    team: str
    """The folder of the archive."""
    suffix: str
    """How its files of weights end."""
    what: str
    """What these are, in the plural."""

    @property
    def suffixes(self) -> frozenset[str]:
        """That of its files."""
        return frozenset({self.suffix})

    def discover(self, tree: WeightsTree) -> Iterator[Unsupported]:
        """The team's files, counted."""
        files = [path for path in tree.files if path.name.endswith(self.suffix) and self.team in path.resolve().parts]
        if files:
            yield Unsupported(self.team, files[0].parent, f"{len(files)} {self.what}")
