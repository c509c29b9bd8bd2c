"""Protect files of the user that have the names of our outputs, such as a manual mask or the input images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.files import read_json
from ensemble.outputs.artifacts import REPORT, Artifact, all_artifact_kinds
from ensemble.outputs.layouts.folder import MEMBERS, FolderLayout
from ensemble.outputs.report.run_report import TOOL
from ensemble.readers.names import image_suffix

#: Paths that `run` may write: outputs of a case, and all in the folder of members' outputs. Those with a wildcard apply only to images.
_OURS = (*(FolderLayout(".*").place(kind) for kind in all_artifact_kinds("*") if not kind.member), f"{MEMBERS}/**/*")


def refuse_overwriting_foreign_files(root: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError if outputs would replace input images, or files that no earlier run wrote according to its report."""
    standing = [
        path for pattern in _OURS for path in sorted(root.glob(pattern)) if "*" not in pattern or image_suffix(path)
    ]
    images = [path for path in inputs if path.exists()]
    read = [path for path in standing if any(path.exists() and path.samefile(image) for image in images)]
    if found := read or ([] if _has_our_report(root) else standing):
        raise UsageError(
            "the outputs would overwrite an input image"
            if read
            else "the outputs would overwrite files that this program did not write",
            where=root,
            found=", ".join(path.relative_to(root).as_posix() for path in found[:8]) + " ..." * (len(found) > 8),
            do="choose another folder for --out, or move the files away",
        )


def _has_our_report(root: Path) -> bool:
    try:
        return bool(read_json(root / Artifact(REPORT).file_name(""))["tool"]["name"] == TOOL)
    except (OSError, ValueError, KeyError, TypeError):
        return False
