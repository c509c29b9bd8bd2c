"""Files that bear the names of our outputs and are not ours: a radiologist's mask, or the very images that are to be segmented."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.readers.names import image_suffix

#: What `run` writes, as patterns; of those with a star only images.
_OURS = ("mask.*", "probability.*", "votes.*", "members/**/*", "report.json", "report.html", "overlay.png")
_TOOL = "isles-ensemble"


def refuse_foreign(root: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError where files would be replaced that no earlier run into this folder has written, as its report tells, or inputs."""
    standing = [
        path for pattern in _OURS for path in sorted(root.glob(pattern)) if "*" not in pattern or image_suffix(path)
    ]
    images = [path for path in inputs if path.exists()]
    read = [path for path in standing if any(path.exists() and path.samefile(image) for image in images)]
    if found := read or ([] if _has_our_report(root) else standing):
        raise UsageError(
            "an image that is read would be replaced"
            if read
            else "files that are not ours lie where the results belong",
            where=root,
            found=", ".join(path.relative_to(root).as_posix() for path in found[:8]) + " ..." * (len(found) > 8),
            do="give another folder as --out, or move them away",
        )


def _has_our_report(root: Path) -> bool:
    try:
        return bool(json.loads((root / "report.json").read_text(encoding="utf-8"))["tool"]["name"] == _TOOL)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
