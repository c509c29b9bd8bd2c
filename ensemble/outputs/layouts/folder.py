"""The output layout of `run`: `mask.nii.gz`, `report.json` and so on in one folder; the outputs of members in `members/`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ensemble.config import ExtraOutputs
from ensemble.outputs.artifacts import REPORT, Artifact, SegmentedCase, case_artifacts
from ensemble.outputs.layouts.index import WRITTEN, earlier_outputs
from ensemble.outputs.layouts.layout import artifacts_by_path, write_artifacts
from ensemble.publish import publish

#: Folder of the members' outputs.
MEMBERS = "members"


@dataclass(frozen=True)
class FolderLayout:
    """Output paths of the command `run`: one file for each role (`OutputRole`); files of single members lie below `members/`."""

    image_suffix: str

    def place(self, artifact: Artifact) -> str:
        name = artifact.file_name(self.image_suffix)
        return f"{MEMBERS}/{artifact.member}_{name}" if artifact.member else name


def publish_run_outputs(case: SegmentedCase, extras: ExtraOutputs, root: Path, image_suffix: str) -> None:
    """Write the outputs of a case into a folder, all or none, replacing those of an earlier case.

    The report lists them all: it is the index by which a later run knows what to replace. Raises UsageError when they can't be written.
    """
    places = artifacts_by_path(case_artifacts(case, extras), FolderLayout(image_suffix))
    for place, artifact in places.items():
        if artifact.role is REPORT:
            places[place] = replace(artifact, payload=artifact.payload | {WRITTEN: sorted(places)})
    with publish(root, replaces=earlier_outputs(root, "mask.nii.gz", "mask.mha", "mask.nrrd")) as staging:
        write_artifacts(places, staging)
