"""The interface of output layouts, each of which gives every artifact a path; and writing artifacts to these paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from ensemble.outputs.artifacts import Artifact
from ensemble.outputs.formats import FORMATS


class Layout(Protocol):
    """The paths of the outputs of one case."""

    def place(self, artifact: Artifact) -> str:
        """Return the path of an artifact, relative to the output folder, with `/` as separator."""


def artifacts_by_path(artifacts: Iterable[Artifact], layout: Layout) -> dict[str, Artifact]:
    """Return the artifacts by their paths in a layout.

    Raises ValueError for a place that leaves the folder, and for two that meet on some file system.
    """
    places: dict[str, Artifact] = {}
    for artifact in artifacts:
        place = layout.place(artifact)
        if not is_inside(place):
            raise ValueError(f"{place!r} is no place below a folder")
        if meets := [other for other in places if _meet(place, other)]:
            raise ValueError(f"two outputs have one place: {place!r}, {meets[0]!r}")
        places[place] = artifact
    return places


def write_artifacts(places: Mapping[str, Artifact], folder: Path) -> None:
    """Write artifacts to their paths below a folder. Raises OSError, and ValueError if a format can't hold a payload."""
    for place, artifact in places.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[artifact.role.format].write(artifact.payload, path)


def is_inside(relative_path: str) -> bool:
    """Return whether a relative path stays below its folder."""
    path = PurePosixPath(relative_path)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in relative_path


def _meet(place: str, other: str) -> bool:
    """Return whether two paths are equal up to case, or one lies below the other."""
    one, two = PurePosixPath(place.casefold()), PurePosixPath(other.casefold())
    return one == two or one in two.parents or two in one.parents
