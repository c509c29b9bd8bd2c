"""The output layout of `batch`, a BIDS derivatives dataset: the files of a case, when they are complete, and the dataset's description."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.config import ExtraOutputs
from ensemble.errors import InputRefused, UsageError
from ensemble.families.names import make_names_unique
from ensemble.files import parse_json, read_json
from ensemble.findings.template import SPACE
from ensemble.folders import unwritable_error
from ensemble.outputs.artifacts import MASK, REPORT, Artifact, SegmentedCase, all_artifact_kinds, case_artifacts
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.outputs.layouts.layout import artifacts_by_path, write_artifacts
from ensemble.outputs.report.run_report import RESEARCH_USE, TOOL
from ensemble.publish import publish_folder, write_json, write_text_atomically
from ensemble.readers.base import RawCase
from ensemble.text import replace_undecodable, replace_undecodable_in_json
from ensemble.types import Modality

_IMAGES = ".nii.gz"
REPORT_FILE = Artifact(REPORT).file_name(_IMAGES)
#: Results that no longer hold, of cases that can't be done anew.
SUPERSEDED = "superseded"
#: Why cases failed, a file each.
FAILED = "failed"
#: Of the images that BIDS has names for: entities, suffix, and what to say of the case's own in the sidecar.
_NAMES = {
    "mask": ("space-dwi_label-lesion", "mask", "Lesion, by vote of the members"),
    "probability": ("space-dwi_label-lesion", "probseg", "Mean lesion probability of the voters"),
    "mnimask": (f"space-{SPACE}_label-lesion", "mask", "Lesion, resampled to the template by an affine transform"),
    "votes": ("space-dwi_desc-votes", "dseg", "How many members voted lesion"),
}
_README = f"""\
# Ischemic stroke lesions, segmented by isles-ensemble

Made by `process.py batch`. Each folder `sub-*/ses-*` (or `sub-*`) holds the lesion mask of one case on the grid of its DWI, and
`{REPORT_FILE}`: what ran, on which files, with which weights, and what was repaired on the way. `summary.csv` and `index.html` list
all cases, failed ones too; `failed/` says why, a file a case. A folder is complete or not there.

{RESEARCH_USE}
"""


def write_case(
    root: Path,
    scratch: Path,
    entities: BidsEntities,
    case: SegmentedCase,
    extras: ExtraOutputs,
    made_of: Mapping[str, Any],
) -> None:
    """Write the outputs of a case of `batch` into a new folder, then move that into place.

    `made_of` (digests of images and weights, options) tells a rerun whether the result is out of date. Raises UsageError.
    """
    layout = BidsLayout(entities.prefix, _labels([outcome.member for outcome in case.result.outcomes]))
    wanted = [artifact for artifact in case_artifacts(case, extras) if artifact.role is not REPORT]
    with publish_folder(root / entities.folder, scratch) as folder:
        places = artifacts_by_path(wanted, layout)
        write_artifacts(places, folder)
        for name, artifact in places.items():
            if names := _names(artifact):
                write_json(_sidecar(artifact, names[2], case.raw), folder / f"{name.removesuffix(_IMAGES)}.json")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        batch = replace_undecodable_in_json({**made_of, "outputs": sizes})
        write_json(case.report | {"batch": batch}, folder / REPORT_FILE)


@dataclass(frozen=True)
class BidsLayout:
    """Output paths of `batch`: BIDS names where BIDS defines them; other files are named by role, and listed in `.bidsignore`."""

    prefix: str
    """Of the case: `sub-01_ses-1`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the members: letters and digits only."""

    def place(self, artifact: Artifact) -> str:
        whose = f"desc-{self.labels[artifact.member]}_" if artifact.member else ""
        if names := _names(artifact):
            entities, suffix, _ = names
            return f"{self.prefix}_{entities}_{whose}{suffix}{_IMAGES}"
        return whose + artifact.file_name(_IMAGES)


def _names(artifact: Artifact) -> tuple[str, str, str] | None:
    return _NAMES.get(artifact.role.name) if artifact.role.format == "image" else None


def mask_path(entities: BidsEntities) -> str:
    """Return the path of a case's mask, relative to the output folder."""
    return (entities.folder / BidsLayout(entities.prefix).place(Artifact(MASK))).as_posix()


def _labels(members: Sequence[str]) -> dict[str, str]:
    """Return a BIDS label for each member.

    Labels hold letters and digits only: where that makes two alike, a digest of the name is added.
    """
    bare = [re.sub(r"[^A-Za-z0-9]", "", name) for name in members]
    return dict(zip(members, make_names_unique(bare, members), strict=True))


def _sidecar(artifact: Artifact, about: str, raw: RawCase) -> dict[str, Any]:
    """Return the JSON sidecar that BIDS requires for an image."""
    return {
        **({"Type": "Lesion"} if artifact.role.name in ("mask", "mnimask") else {}),
        "Description": f"Output of the member {artifact.member}" if artifact.member else about,
        "SpatialReference": SPACE
        if artifact.role.name == "mnimask"
        else replace_undecodable(str(raw.images[Modality.DWI].path)),
        "Sources": [replace_undecodable(str(image.path)) for image in raw.images.values()],
    }


def read_report(root: Path, entities: BidsEntities) -> dict[str, Any] | None:
    """Return the report of a complete result of this program; None if there is none.

    It may be of another version: any field but the list of its outputs, `batch.outputs`, may be missing or be something else.
    """
    folder = root / entities.folder
    try:
        report: dict[str, Any] = read_json(folder / REPORT_FILE)
        outputs = report["batch"]["outputs"]
        whole = all((folder / name).stat().st_size == size for name, size in outputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return report if whole else None


def refuse_occupied_case_folder(root: Path, entities: BidsEntities) -> None:
    """Raise InputRefused if the folder of a case holds something other than a result of this program."""
    folder = root / entities.folder
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and not folder.is_symlink():
        inner = list(folder.iterdir())
        if not inner or ((folder / REPORT_FILE).is_file() and all(path.is_file() for path in inner)):
            return
    raise InputRefused(
        "the folder for this case's results contains other files",
        where=folder,
        do="move them away, or choose another output folder",
    )


def move_to_superseded(root: Path, entities: BidsEntities) -> Path | None:
    """Move an outdated result to `superseded/`. Returns its new path; None if there was no result."""
    if not (root / entities.folder / REPORT_FILE).is_file():
        return None
    target = root / SUPERSEDED / entities.prefix
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    return (root / entities.folder).rename(target)


def refuse_unsafe_output_folder(root: Path, dataset: Path) -> None:
    """Raise UsageError if the output folder can't be read, is the dataset itself, or is another dataset.

    The description of another dataset would be overwritten.
    """
    described = root / "dataset_description.json"
    try:
        makers = parse_json(described.read_text(encoding="utf-8"))["GeneratedBy"]
        ours = any(maker["Name"] == TOOL for maker in makers)
    except FileNotFoundError:
        ours = True
    except NotADirectoryError as error:
        what = "the output path is a file" if root.is_file() else "the output path is inside a file, not a folder"
        raise UsageError(what, where=root, do="give a folder") from error
    except OSError as error:
        raise unwritable_error(root, error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours or root.resolve() == dataset.resolve():
        raise UsageError(
            "the output folder is itself a dataset",
            where=root,
            do="use a separate folder for the results of batch",
        )


def _no_bids() -> list[str]:
    """Return the `.bidsignore` patterns of outputs that BIDS has no names for. A trailing slash would not ignore a folder itself."""
    unknown = [BidsLayout("", {"*": "*"}).place(kind) for kind in all_artifact_kinds("*") if not _names(kind)]
    return [
        REPORT_FILE,
        *(f"**/{name}" for name in unknown),
        "index.html",
        "summary.csv",
        "summary.parquet",
        SUPERSEDED,
        FAILED,
        ".batch/",
    ]


def _container(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the ContainerInfo that BIDS requires; empty outside a container. The image knows its tag (see the Dockerfile)."""
    tag = environment.get("CONTAINER_TAG", "")
    image = environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER")
    if image:
        return {
            "Container": {"Type": "apptainer", "Tag": tag or Path(image).name, "URI": Path(image).absolute().as_uri()}
        }
    return {"Container": {"Type": "docker", "Tag": tag}} if tag else {}


def write_dataset_description(root: Path, scratch: Path, dataset: Path) -> None:
    """Write the files that make the folder a BIDS derivatives dataset. Raises OSError."""
    description = {
        "Name": "Ischemic stroke lesions",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": TOOL, "Version": __version__, "Description": RESEARCH_USE} | _container(os.environ)],
        "SourceDatasets": [{"URL": dataset.resolve().as_uri()}],
    }
    for name, text in (
        ("dataset_description.json", json.dumps(description, indent=2) + "\n"),
        (".bidsignore", "\n".join(_no_bids()) + "\n"),
        ("README.md", _README),
    ):
        if name == "dataset_description.json" or not (root / name).exists():  # the others may have been edited
            write_text_atomically(root / name, text, scratch)
