"""The layout of `batch`, a tree of BIDS derivatives: what a case's folder holds, when it is complete, and what describes the whole."""

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
from ensemble.families.names import distinct
from ensemble.files import parse_json, read_json
from ensemble.findings.template import SPACE
from ensemble.folders import unwritable
from ensemble.outputs.artifacts import MASK, REPORT, Artifact, SegmentedCase, artifacts, kinds
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.outputs.layouts.layout import placed, write
from ensemble.outputs.report.run_report import RESEARCH_USE, TOOL
from ensemble.publish import publish_folder, replace_text, write_json
from ensemble.readers.base import RawCase
from ensemble.text import all_printable, printable
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
    "mnimask": (f"space-{SPACE}_label-lesion", "mask", "Lesion, brought to the template by an affine map"),
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
    place: BidsEntities,
    case: SegmentedCase,
    extras: ExtraOutputs,
    made_of: Mapping[str, Any],
) -> None:
    """Put the folder of a case in its place. `made_of` tells a rerun what the result was made of. Raises UsageError."""
    layout = Bids(place.prefix, _labels([outcome.member for outcome in case.result.outcomes]))
    wanted = [artifact for artifact in artifacts(case, extras) if artifact.role is not REPORT]
    with publish_folder(root / place.folder, scratch) as folder:
        places = placed(wanted, layout)
        write(places, folder)
        for name, artifact in places.items():
            if names := _names(artifact):
                write_json(_sidecar(artifact, names[2], case.raw), folder / f"{name.removesuffix(_IMAGES)}.json")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        batch = all_printable({**made_of, "outputs": sizes})
        write_json(case.report | {"batch": batch}, folder / REPORT_FILE)


@dataclass(frozen=True)
class Bids:
    """BIDS names for what BIDS knows; everything else is called by its role, and is in `.bidsignore`."""

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


def mask_file(place: BidsEntities) -> str:
    """Return the mask of a case, below the output folder."""
    return (place.folder / Bids(place.prefix).place(Artifact(MASK))).as_posix()


def _labels(members: Sequence[str]) -> dict[str, str]:
    """Return a BIDS label for each member.

    Labels hold letters and digits only: where that makes two alike, a digest of the name is added.
    """
    bare = [re.sub(r"[^A-Za-z0-9]", "", name) for name in members]
    return dict(zip(members, distinct(bare, members), strict=True))


def _sidecar(artifact: Artifact, about: str, raw: RawCase) -> dict[str, Any]:
    """Return what BIDS asks to be said of an image."""
    return {
        **({"Type": "Lesion"} if artifact.role.name in ("mask", "mnimask") else {}),
        "Description": f"What the member {artifact.member} says" if artifact.member else about,
        "SpatialReference": SPACE if artifact.role.name == "mnimask" else printable(str(raw.images[Modality.DWI].path)),
        "Sources": [printable(str(image.path)) for image in raw.images.values()],
    }


def read_report(root: Path, place: BidsEntities) -> dict[str, Any] | None:
    """Return the report of a complete result of ours; None where there is none.

    It may be of another version: any field but the list of its outputs, `batch.outputs`, may be missing or be something else.
    """
    folder = root / place.folder
    try:
        report: dict[str, Any] = read_json(folder / REPORT_FILE)
        outputs = report["batch"]["outputs"]
        whole = all((folder / name).stat().st_size == size for name, size in outputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return report if whole else None


def refuse_foreign(root: Path, place: BidsEntities) -> None:
    """Raise InputRefused when something that is no result of ours stands in the place of a case: it must not be replaced."""
    folder = root / place.folder
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and not folder.is_symlink():
        inner = list(folder.iterdir())
        if not inner or ((folder / REPORT_FILE).is_file() and all(path.is_file() for path in inner)):
            return
    raise InputRefused(
        "something else stands where the results belong", where=folder, do="move it away, or give another output folder"
    )


def set_aside(root: Path, place: BidsEntities) -> Path | None:
    """Move a result that no longer holds out of the tree of results. Returns where to; None when there is nothing."""
    if not (root / place.folder / REPORT_FILE).is_file():
        return None
    target = root / SUPERSEDED / place.prefix
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    return (root / place.folder).rename(target)


def refuse_foreign_tree(root: Path, dataset: Path) -> None:
    """Raise UsageError when the output folder is the dataset itself, or another dataset, whose description we would overwrite.

    Or no folder that can be read.
    """
    described = root / "dataset_description.json"
    try:
        makers = parse_json(described.read_text(encoding="utf-8"))["GeneratedBy"]
        ours = any(maker["Name"] == TOOL for maker in makers)
    except FileNotFoundError:
        ours = True
    except NotADirectoryError as error:
        raise UsageError("the output folder is a file, or lies below one", where=root, do="give a folder") from error
    except OSError as error:
        raise unwritable(root, error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours or root.resolve() == dataset.resolve():
        raise UsageError(
            "the output folder is a dataset of its own",
            where=root,
            do="give a folder of its own to the results of batch",
        )


def _no_bids() -> list[str]:
    """Return patterns, for `.bidsignore`, of what BIDS has no names for. With a slash behind it a folder itself would not be ignored."""
    unknown = [Bids("", {"*": "*"}).place(kind) for kind in kinds("*") if not _names(kind)]
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
    """Return what BIDS asks to be said of the container; nothing outside of one. The image says its tag (see the Dockerfile)."""
    tag = environment.get("CONTAINER_TAG", "")
    image = environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER")
    if image:
        return {
            "Container": {"Type": "apptainer", "Tag": tag or Path(image).name, "URI": Path(image).absolute().as_uri()}
        }
    return {"Container": {"Type": "docker", "Tag": tag}} if tag else {}


def describe_tree(root: Path, scratch: Path, dataset: Path) -> None:
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
            replace_text(root / name, text, scratch)
