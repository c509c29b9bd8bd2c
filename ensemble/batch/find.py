"""Which cases a dataset holds: BIDS trees, contract-like folders, `<case>/{dwi,adc,flair}.*`, or a CSV worklist.

Nothing that looks like a case is passed over: a folder without usable images, or with too many, is a case with a problem.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.contract.isles22 import INPUT_SLUGS
from ensemble.errors import InputRefused
from ensemble.readers.dicom import ARCHIVE, is_dicom, shown_in
from ensemble.readers.imagefile import image_suffix, stem
from ensemble.types import Modality

_BIDS = re.compile(r"^sub-(?P<subject>[A-Za-z0-9]+)(?:_ses-(?P<session>[A-Za-z0-9]+))?(?=_|$)")
_MODALITY = re.compile(r"^(?P<case>.*?)(?:^|[_\-. ])(?P<modality>dwi|adc|flair)$", re.IGNORECASE)
#: Folders beside the cases: of a BIDS dataset, and our own.
_NO_CASES = {"derivatives", "sourcedata", "code", "stimuli", "phenotype"}
_SLUGS = {slug: modality for modality, slug in INPUT_SLUGS.items()}


@dataclass(frozen=True)
class FoundCase:
    """A case of a dataset, before anything of it is read."""

    name: str
    """What its dataset calls it; unique there."""
    files: Mapping[Modality, Path] = field(default_factory=dict)
    problem: InputRefused | None = None
    """Why it can't be segmented, where that is known already."""


@dataclass(frozen=True)
class _Image:
    """An image file, and what its place and name say of it."""

    path: Path
    modality: Modality
    group: tuple[str, ...]
    """Images of one group belong to one case, unless a modality comes up twice."""
    prefix: str = ""
    """What the file's name says of its case, for groups that hold several."""


def find_cases(dataset: Path, out: Path) -> tuple[FoundCase, ...]:
    """The cases of a dataset in the order of their names; `out` is not looked into.

    Raises InputRefused when it does not exist, can't be read, or holds no case.
    """
    try:
        found = _from_worklist(dataset) if dataset.is_file() else _from_folder(dataset, out)
    except OSError as error:
        raise InputRefused(
            "the dataset can't be read",
            where=error.filename or dataset,
            found=f"{error.strerror} (we run as user {os.getuid()})",
            do="check the path and its permissions",
        ) from error
    if not any(case.files for case in found):
        raise InputRefused(
            "the dataset holds no case",
            where=dataset,
            found=_names(dataset) if dataset.is_dir() else "no row names a file",
            do="give a BIDS tree, a folder of <case>/dwi.*, adc.* (flair.*), a folder of <case>/images/dwi-brain-mri/...,"
            " or a .csv with the columns case, dwi, adc, flair",
        )
    return found


def what_it_holds(path: Path, root: Path) -> _Image | None:
    """The image of a case that a path holds, by its place and name; None for anything else. The one place that knows layouts."""
    if not image_suffix(path):
        return None
    folders, name = path.relative_to(root).parent.parts, stem(path)
    if len(folders) >= 2 and folders[-2] == "images" and folders[-1] in _SLUGS:
        return _Image(path, _SLUGS[folders[-1]], folders[:-2])
    match = _MODALITY.match(name)
    if match is None:
        return None
    modality = Modality(match["modality"].lower())
    if bids := _BIDS.match(name):
        return _Image(
            path, modality, ("sub-" + bids["subject"], *(["ses-" + bids["session"]] if bids["session"] else []))
        )
    return _Image(path, modality, folders, match["case"])


def _from_folder(root: Path, out: Path) -> tuple[FoundCase, ...]:
    root = root.resolve()
    if not root.is_dir():
        raise InputRefused("the dataset does not exist", where=root, do="check the path")
    groups: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    folders: set[Path] = set()
    unreadable: list[OSError] = []
    for folder, names in _walk(root, out.resolve(), unreadable):
        folders.add(folder)
        for name in names:
            if image := what_it_holds(folder / name, root):
                groups[image.group].append(image)
    cases = [case for group, images in groups.items() for case in _cases_of(group, images, root)]
    used = {above for images in groups.values() for image in images for above in image.path.parents}
    cases += [_without_image_files(folder, root) for folder in _case_folders(root, folders) if folder not in used]
    cases += [_unreadable(error, root) for error in unreadable]
    return tuple(sorted(cases, key=lambda case: case.name))


def _cases_of(group: tuple[str, ...], images: list[_Image], root: Path) -> Iterator[FoundCase]:
    """One case, or one for each prefix where a folder holds the images of several."""
    name = "/".join(group) or root.name
    prefixes = {image.prefix for image in images}
    if len({image.modality for image in images}) == len(images) or len(prefixes) == 1:
        yield _case(name, images)
        return
    for prefix in prefixes:
        inner = "/".join((*group, prefix)) if prefix else name
        yield _case(inner, [image for image in images if image.prefix == prefix])


def _case(name: str, images: list[_Image]) -> FoundCase:
    for modality in Modality:
        if len(several := [image.path for image in images if image.modality is modality]) > 1:
            refused = InputRefused(
                f"there is more than one {modality.value.upper()} image",
                where=several[0].parent,
                found=", ".join(sorted(path.name for path in several)),
                do="leave exactly one, or name the files to take in a CSV worklist",
            )
            return FoundCase(name, {image.modality: image.path for image in images}, refused)
    files = {modality: image.path for modality in Modality for image in images if image.modality is modality}
    return FoundCase(name, files, _missing(files, images[0].path.parent))


def _missing(files: Mapping[Modality, Path], where: Path) -> InputRefused | None:
    for modality in (Modality.DWI, Modality.ADC):
        if modality not in files:
            return InputRefused(
                f"there is no {modality.value.upper()} image",
                where=where,
                found=", ".join(str(path.name) for path in files.values()),
                do="DWI and ADC are both needed",
            )
    return None


def _without_image_files(folder: Path, root: Path) -> FoundCase:
    """A case's folder in which no file is an image of a modality by its name: a case of DICOM, or one with a problem."""
    name = folder.relative_to(root).as_posix()
    try:
        files = _dicom_by_name(folder) or dict.fromkeys(shown_in(folder), folder)
    except InputRefused as problem:
        return FoundCase(name, problem=problem)
    if files:
        ordered = {modality: files[modality] for modality in Modality if modality in files}
        return FoundCase(name, ordered, _missing(ordered, folder))
    refused = InputRefused(
        "there is no DWI and no ADC image", where=folder, found=_names(folder), do="add them, or remove the folder"
    )
    return FoundCase(name, problem=refused)


def _dicom_by_name(folder: Path) -> dict[Modality, Path]:
    """Folders and archives of DICOM named by modality, or by the contract: `dwi/`, `adc.zip`, `images/dwi-brain-mri/`."""
    found: dict[Modality, Path] = {}
    for entry in sorted((*folder.glob("*"), *folder.glob("images/*"))):
        by_name = _MODALITY.match(entry.stem if entry.suffix.lower() == ARCHIVE else entry.name)
        modality = _SLUGS.get(entry.name) or (Modality(by_name["modality"].lower()) if by_name else None)
        if modality is None or not is_dicom(entry) or (entry.is_dir() and not any(entry.rglob("*"))):
            continue
        if modality in found:
            raise InputRefused(
                f"there is more than one {modality.value.upper()} image",
                where=folder,
                found=f"{found[modality].name}, {entry.name}",
                do="leave exactly one, or name them in a CSV worklist",
            )
        found[modality] = entry
    return found


def _unreadable(error: OSError, root: Path) -> FoundCase:
    folder = Path(error.filename)
    if folder == root:
        raise error
    refused = InputRefused(
        "the folder can't be read",
        where=folder,
        found=f"{error.strerror} (we run as user {os.getuid()})",
        do="give this user the right to read it",
    )
    return FoundCase(folder.relative_to(root).as_posix(), problem=refused)


def _case_folders(root: Path, folders: Iterable[Path]) -> Iterator[Path]:
    """Folders that stand where a case is expected: sessions and subjects of a BIDS tree, else whatever lies directly below the root."""
    inner = [folder for folder in folders if folder != root]
    subjects = [folder for folder in inner if folder.name.startswith("sub-")]
    sessions = [folder for folder in inner if folder.name.startswith("ses-") and folder.parent in subjects]
    yield from sessions
    yield from (folder for folder in subjects if folder not in {session.parent for session in sessions})
    if not subjects:
        yield from (folder for folder in inner if folder.parent == root)


def _walk(root: Path, out: Path, unreadable: list[OSError]) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names in them, links followed but no folder entered twice; hidden ones and those without cases are not entered."""
    entered: set[str] = set()
    for top, inner, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        folder = Path(top)
        if (real := os.path.realpath(top)) in entered or (folder != root and _is_derivative(folder)):
            inner.clear()
            continue
        entered.add(real)
        inner[:] = sorted(
            name for name in inner if not name.startswith(".") and name not in _NO_CASES and folder / name != out
        )
        yield folder, sorted(name for name in names if not name.startswith("."))


def _is_derivative(folder: Path) -> bool:
    """Whether a folder says of itself that it holds results: ours of another time, for example."""
    try:
        described = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("DatasetType") == "derivative"


def _from_worklist(path: Path) -> tuple[FoundCase, ...]:
    """Cases of a table with the columns case (may be missing), dwi, adc and flair (may be missing or empty); paths are relative to it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter, restval=""))
        columns = {name.strip().lower() for name in rows[0]} if rows else set()
    except (UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise InputRefused(
            "the worklist is no table of text", where=path, found=str(error), do="save it as CSV, UTF-8"
        ) from error
    if not {"dwi", "adc"} <= columns:
        raise InputRefused(
            "the worklist lacks columns",
            where=path,
            found=", ".join(sorted(columns)) or "no row",
            do="name the columns case, dwi, adc, flair in the first line",
        )
    cases: dict[str, FoundCase] = {}
    for row in rows:
        cells = {
            (name or "").strip().lower(): (cell or "").strip() for name, cell in row.items() if isinstance(cell, str)
        }
        files = {modality: path.parent / cells[modality] for modality in Modality if cells.get(modality)}
        name = cells.get("case") or (stem(files[Modality.DWI]) if Modality.DWI in files else "")
        if not name and not files:
            continue
        if not name or name in cases:
            raise InputRefused(
                "the worklist names a case twice" if name else "a row of the worklist names no case",
                where=path,
                found=name or str(row),
                do="give each row its own name in the column case",
            )
        cases[name] = FoundCase(name, files, _missing(files, path))
    return tuple(cases[name] for name in sorted(cases))


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "an empty folder"
