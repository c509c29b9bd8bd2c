"""Find the outputs of an earlier run in a folder, from the index that it wrote with them, not from file names.

The index is a list of paths in a file that is written in any case, and last: `report.json` of `run`, and `results.json` of the contract,
which allows no files unknown to the platform. (Each case of a batch has a folder of its own, which is replaced whole.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ensemble.files import read_json
from ensemble.outputs.layouts.layout import is_inside

#: Key of the index in those files.
WRITTEN = "written"
_HOLDERS = ("report.json", "results.json")
_IMAGES = ("nii.gz", "mha", "nrrd")
#: Name patterns of the files that the first version, which had no index, wrote beside a mask. No new patterns are added.
_WITHOUT_INDEX = (
    *(f"{name}.{ending}" for name in ("probability", "votes") for ending in _IMAGES),
    *(f"members/**/*_{name}.{ending}" for name in ("mask", "probability") for ending in _IMAGES),
    *("report.json", "report.html", "overlay.png"),
)


def earlier_outputs(root: Path, *masks: str) -> list[str]:
    """Return the files that an earlier run's index lists, relative to `root`.

    Without an index, those that have names as the first version gave them, and `masks`.
    """
    places = [place for name in _HOLDERS for place in _listed(root / name)]
    if not places:
        found = (path for pattern in (*masks, *_WITHOUT_INDEX) for path in sorted(root.glob(pattern)))
        places = [path.relative_to(root).as_posix() for path in found]
    return [place for place in dict.fromkeys(places) if _stands(root, place)]


def _listed(holder: Path) -> Iterator[str]:
    try:
        content: Any = read_json(holder)
    except (OSError, ValueError, RecursionError):
        return
    for entry in content if isinstance(content, list) else [content]:
        places = entry.get(WRITTEN) if isinstance(entry, dict) else None
        yield from (place for place in (places if isinstance(places, list) else ()) if isinstance(place, str))


def _stands(root: Path, place: str) -> bool:
    """Return whether a file exists and really lies below the root: anybody may write an index, and folders may be links."""
    try:
        path = root / place
        return is_inside(place) and path.is_file() and path.parent.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError):
        return False
