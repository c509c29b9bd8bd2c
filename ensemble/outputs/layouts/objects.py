"""The output layout of `listen` and of mercure modules: only DICOM objects, in one folder."""

from __future__ import annotations

from pathlib import Path

from ensemble.config import ExtraOutputs
from ensemble.outputs.artifacts import Artifact, SegmentedCase, dicom_object_artifacts
from ensemble.outputs.layouts.layout import artifacts_by_path, write_artifacts
from ensemble.publish import publish


class DicomObjectsLayout:
    """Output paths of DICOM objects: one file for each role (`OutputRole`), in one folder."""

    def place(self, artifact: Artifact) -> str:
        return artifact.file_name("")


def publish_dicom_objects(case: SegmentedCase, extras: ExtraOutputs, root: Path) -> None:
    """Write the DICOM objects of a case into a folder, all or none. Raises UsageError if they can't be written."""
    with publish(root) as staging:
        write_dicom_objects(case, extras, staging)


def write_dicom_objects(case: SegmentedCase, extras: ExtraOutputs, folder: Path) -> None:
    """Write the DICOM objects of a case into a folder that no other process reads yet. Raises OSError."""
    write_artifacts(artifacts_by_path(dicom_object_artifacts(case, extras), DicomObjectsLayout()), folder)
