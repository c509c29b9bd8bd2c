"""The output tree: what a case's folder holds, when it is complete, and what describes the whole (BIDS derivatives)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.errors import InputRefused, UsageError
from ensemble.families.names import distinct
from ensemble.files import parse_json, read_json
from ensemble.folders import unwritable
from ensemble.outputs.extras import Extras, write_report
from ensemble.outputs.layouts.places import Place
from ensemble.outputs.report.run_report import RESEARCH_USE, build_report
from ensemble.pipeline import Ensemble, Result
from ensemble.publish import publish_folder, replace_text, write_json, write_volume
from ensemble.readers.base import RawCase
from ensemble.streams import all_printable, printable
from ensemble.types import Modality
from ensemble.volume import Volume

REPORT = "report.json"
#: Results that no longer hold, of cases that can't be done anew.
SUPERSEDED = "superseded"
_SPACE = "space-dwi"
_TOOL = "isles-ensemble"
_NO_BIDS = (
    REPORT,
    "**/" + REPORT,
    "**/report.html",
    "**/overlay.png",
    "index.html",
    "summary.csv",
    f"{SUPERSEDED}/",
    ".batch/",
)
_README = f"""\
# Ischemic stroke lesions, segmented by isles-ensemble

Made by `process.py batch`. Each folder `sub-*/ses-*` (or `sub-*`) holds the lesion mask of one case on the grid of its DWI, and
`{REPORT}`: what ran, on which files, with which weights, and what was repaired on the way. `summary.csv` and `index.html` list
all cases, failed ones too. A folder is complete or not there.

{RESEARCH_USE}
"""


def write_case(
    root: Path,
    scratch: Path,
    place: Place,
    raw: RawCase,
    result: Result,
    ensemble: Ensemble,
    extras: Extras,
    made_of: Mapping[str, Any],
) -> None:
    """Put the folder of a case in its place. `made_of` tells a rerun what the result was made of. Raises UsageError."""
    with publish_folder(root / place.folder, scratch) as folder:
        names = _Names(folder, place, raw)
        names.write(
            result.fused.mask,
            "label-lesion",
            "mask",
            {"Type": "Lesion", "Description": "Lesion, by vote of the members"},
        )
        for outcome, label in zip(result.outcomes, _labels(result), strict=True):
            if outcome.prediction is None:
                continue
            about = {"Description": f"What the member {outcome.member} says"}
            if extras.save_member_masks:
                names.write(outcome.prediction.mask, f"label-lesion_{label}", "mask", about | {"Type": "Lesion"})
            if extras.save_probabilities:
                names.write(outcome.prediction.probability, f"label-lesion_{label}", "probseg", about)
        if extras.save_probabilities:
            names.write(
                result.fused.mean, "label-lesion", "probseg", {"Description": "Mean lesion probability of the voters"}
            )
        if extras.save_member_masks:
            names.write(result.fused.votes, "desc-votes", "dseg", {"Description": "How many members voted lesion"})
        if extras.report:
            write_report(raw, result, ensemble, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != REPORT}
        batch = all_printable({**made_of, "outputs": sizes})
        write_json(build_report(raw, result, ensemble) | {"batch": batch}, folder / REPORT)


def _labels(result: Result) -> list[str]:
    """A BIDS entity for each member. Labels hold letters and digits only: where that makes two alike, a digest of the name is added."""
    names = [outcome.member for outcome in result.outcomes]
    return [f"desc-{label}" for label in distinct([re.sub(r"[^A-Za-z0-9]", "", name) for name in names], names)]


class _Names:
    """Writes volumes under BIDS names, each with the sidecar that BIDS asks for."""

    def __init__(self, folder: Path, place: Place, raw: RawCase) -> None:
        self._folder, self._prefix = folder, place.prefix
        self._about = {
            "SpatialReference": printable(str(raw.images[Modality.DWI].path)),
            "Sources": [printable(str(image.path)) for image in raw.images.values()],
        }

    def write(self, volume: Volume, entities: str, suffix: str, about: Mapping[str, str]) -> None:
        name = f"{self._prefix}_{_SPACE}_{entities}_{suffix}"
        write_volume(volume, self._folder / f"{name}.nii.gz")
        write_json({**about, **self._about}, self._folder / f"{name}.json")


def read_report(root: Path, place: Place) -> dict[str, Any] | None:
    """The report of a complete result of ours; None where there is none."""
    folder = root / place.folder
    try:
        report: dict[str, Any] = read_json(folder / REPORT)
        outputs = report["batch"]["outputs"]
        whole = all((folder / name).stat().st_size == size for name, size in outputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if whole else None


def refuse_foreign(root: Path, place: Place) -> None:
    """Raise InputRefused when something that is no result of ours stands in the place of a case: it must not be replaced."""
    folder = root / place.folder
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and not folder.is_symlink():
        inner = list(folder.iterdir())
        if not inner or ((folder / REPORT).is_file() and all(path.is_file() for path in inner)):
            return
    raise InputRefused(
        "something else stands where the results belong", where=folder, do="move it away, or give another output folder"
    )


def set_aside(root: Path, place: Place) -> Path | None:
    """Move a result that no longer holds out of the tree of results. Returns where to; None when there is nothing."""
    if not (root / place.folder / REPORT).is_file():
        return None
    target = root / SUPERSEDED / place.prefix
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    return (root / place.folder).rename(target)


def refuse_foreign_tree(root: Path, dataset: Path) -> None:
    """Raise UsageError when the output folder is the dataset itself, or another dataset, whose description we would overwrite; or no
    folder that can be read."""
    described = root / "dataset_description.json"
    try:
        makers = parse_json(described.read_text(encoding="utf-8"))["GeneratedBy"]
        ours = any(maker["Name"] == _TOOL for maker in makers)
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


def describe_tree(root: Path, scratch: Path, dataset: Path) -> None:
    """Write the files that make the folder a BIDS derivatives dataset. Raises OSError."""
    description = {
        "Name": "Ischemic stroke lesions",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": _TOOL, "Version": __version__, "Description": RESEARCH_USE}],
        "SourceDatasets": [{"URL": dataset.resolve().as_uri()}],
    }
    for name, text in (
        ("dataset_description.json", json.dumps(description, indent=2) + "\n"),
        (".bidsignore", "\n".join(_NO_BIDS) + "\n"),
        ("README.md", _README),
    ):
        if name == "dataset_description.json" or not (root / name).exists():  # the others may have been edited
            replace_text(root / name, text, scratch)
