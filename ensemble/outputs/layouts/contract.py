"""The output layout of the contract: the mask in its interface's folder, `results.json`, and other requested outputs at the root.

`results.json` is the index by which a later run knows which files to replace: the platform allows no other file to refer to the mask
(only images below `/output/images`). It also lists the extra outputs; without any it is exactly the platform's format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.config import ExtraOutputs
from ensemble.errors import UsageError
from ensemble.files import read_json
from ensemble.outputs.artifacts import MASK, Artifact, SegmentedCase, all_artifact_kinds, case_artifacts
from ensemble.outputs.layouts.folder import FolderLayout
from ensemble.outputs.layouts.index import WRITTEN, earlier_outputs
from ensemble.outputs.layouts.layout import artifacts_by_path, write_artifacts
from ensemble.publish import publish, write_json
from ensemble.readers.names import image_suffix

OUTPUT_SLUG = "stroke-lesion-segmentation"
MASKS = f"images/{OUTPUT_SLUG}"
RESULTS = "results.json"


@dataclass(frozen=True)
class ContractLayout:
    """Output paths of a contract run: the mask where grand-challenge expects it, all else as in the layout of `run`."""

    mask_name: str

    def place(self, artifact: Artifact) -> str:
        if artifact.role is MASK:
            return f"{MASKS}/{self.mask_name}"
        return FolderLayout(".mha").place(artifact)


def earlier_masks(output_root: Path) -> list[str]:
    """Return the masks that an earlier run's `results.json` lists, as paths relative to the output root.

    The list is empty if the file is missing, can't be read, or has another structure.
    """
    try:
        cases = read_json(output_root / RESULTS)
        names = [
            str(output["filename"]) for case in cases for output in case["outputs"] if output["slug"] == OUTPUT_SLUG
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [f"{MASKS}/{name}" for name in names if name == Path(name).name]


def refuse_unknown_masks(output_root: Path, mask_name: str) -> None:
    """Raise UsageError if the mask folder holds a further mask that no `results.json` lists: the platform rejects two."""
    known = {*earlier_masks(output_root), f"{MASKS}/{mask_name}"}
    masks = [path for path in (output_root / MASKS).glob("*") if image_suffix(path)]
    if unknown := sorted(path.name for path in masks if f"{MASKS}/{path.name}" not in known):
        raise UsageError(
            "the output folder contains a mask of another case",
            where=output_root / MASKS,
            found=", ".join(unknown),
            do="move it away, or choose another output folder",
        )


def publish_contract_outputs(
    case: SegmentedCase, extras: ExtraOutputs, output_root: Path, mask_name: str, results: Sequence[Mapping[str, Any]]
) -> None:
    """Write the outputs of a case below the output root, all or none, replacing those of an earlier case.

    `results` is the content of `results.json`. Raises UsageError when they can't be written."""
    layout = ContractLayout(mask_name)
    places = artifacts_by_path(case_artifacts(case, extras), layout)
    beside = sorted(set(places) - {f"{MASKS}/{mask_name}"})
    replaces = (*earlier_masks(output_root), *earlier_outputs(output_root))
    with publish(output_root, replaces=replaces) as staging:
        write_artifacts(places, staging)
        write_json([{**entry, WRITTEN: beside} if beside else entry for entry in results], staging / RESULTS)


def output_patterns() -> list[str]:
    """Return glob patterns that match every possible output, of any case and members, to clean up after a killed process."""
    return [RESULTS, *map(ContractLayout("*.mha").place, all_artifact_kinds("*"))]
