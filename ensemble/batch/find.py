"""Which cases a dataset holds: BIDS trees, contract-like folders, `<case>/{dwi,adc,flair}.*`, or a CSV worklist.

Nothing that looks like a case is passed over: a folder without usable images, or with too many, is a case with a problem.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.contract.isles22 import INPUT_SLUGS
from ensemble.errors import InputRefused
from ensemble.files import read_json
from ensemble.readers.dicom.read import is_dicom, shown_in
from ensemble.readers.names import ARCHIVE, image_suffix, stem
from ensemble.readers.sources import is_annexed, may_tell_b_values, real_path
from ensemble.readers.volumes import no_adc
from ensemble.types import Modality

log = logging.getLogger(__name__)

_BIDS = re.compile(r"^sub-(?P<subject>[A-Za-z0-9]+)(?:_ses-(?P<session>[A-Za-z0-9]+))?(?=_|$)")
_MODALITY = re.compile(r"^(?P<case>.*?)(?:^|[_\-. ])(?P<modality>dwi|adc|flair)$", re.IGNORECASE)
#: Folders beside the cases: of a BIDS dataset, and our own.
_NO_CASES = {"derivatives", "sourcedata", "code", "stimuli", "phenotype"}
#: Folders that say what an image is, not whose.
_KINDS = {"anat", "dwi", "adc", "flair"}
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
    labels: tuple[str, ...] = ()
    """The BIDS labels of its case, where its name has some."""
    holder: tuple[str, ...] = ()
    """What holds its subject's folder, then: several may (sites, say), and count alike."""
    at_odds: bool = False
    """Whether the folders that it lies in have other labels than its name."""


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
    """The image of a case that a path holds, by its place and name; None for anything else. The one place that knows layouts.

    A path that is no image file is taken for a folder or an archive of DICOM.
    """
    folders, name = path.relative_to(root).parent.parts, stem(path) if image_suffix(path) else _dicom_name(path)
    one_file = image_suffix(path) or path.suffix.lower() == ARCHIVE
    if name in _SLUGS and folders[-1:] == ("images",) and not one_file:
        return _Image(path, _SLUGS[name], folders[:-1])
    if len(folders) >= 2 and folders[-2] == "images" and folders[-1] in _SLUGS and one_file:
        return _Image(path, _SLUGS[folders[-1]], folders[:-2])
    match = _MODALITY.match(name)
    if match is None:
        return None
    modality = Modality(match["modality"].lower())
    return _labelled(path, modality, folders, match["case"]) or _Image(path, modality, folders, match["case"])


def _labelled(path: Path, modality: Modality, folders: tuple[str, ...], name: str) -> _Image | None:
    """An image whose name begins with BIDS labels; None for others."""
    own = _BIDS.match(name)
    if own is None:
        return None
    subjects = [number for number, folder in enumerate(folders) if _BIDS.match(folder)]
    if subjects:
        holder, inner, prefix = folders[: subjects[-1]], folders[subjects[-1] :], ""
    else:
        about = [folder.lower() in _KINDS or folder.startswith("ses-") for folder in folders]
        at = max((number for number, only in enumerate(about, start=1) if not only), default=0)
        # without a folder of its own, a subject is told by its whole name but what BIDS knows ("run-1")
        rest = [part for part in name[own.end() :].split("_") if part and "-" not in part]
        holder, inner, prefix = folders[:at], ("sub-" + own["subject"], *folders[at:]), "_".join(rest)
    outer = _BIDS.match(inner[0])
    assert outer is not None
    sessions = [folder[4:] for folder in inner[1:] if folder.startswith("ses-")]
    said = [session for session in (outer["session"], *sessions, own["session"]) if session]
    labels = ("sub-" + outer["subject"], *("ses-" + session for session in said[:1]))
    group = (*holder, inner[0], *(() if outer["session"] else labels[1:]))
    at_odds = len(set(said)) > 1 or own["subject"] != outer["subject"]
    return _Image(path, modality, group, prefix, labels, holder, at_odds)


def _from_folder(root: Path, out: Path) -> tuple[FoundCase, ...]:
    root = root.resolve()
    if not root.is_dir():
        raise InputRefused("the dataset does not exist", where=root, do="check the path")
    groups: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    dicom: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    folders: set[Path] = set()
    unreadable: list[OSError] = []
    for folder, names in _walk(root, out.resolve(), unreadable):
        folders.add(folder)
        for path in (folder / name for name in names):
            if image_suffix(path) and (image := what_it_holds(path, root)):
                groups[image.group].append(image)
        for path in (*([folder] if folder != root else []), *(folder / name for name in names)):
            if not image_suffix(path) and (image := what_it_holds(path, root)) and is_dicom(path):
                dicom[image.group].append(image)
    for group, images in groups.items():
        images += [image for image in dicom[group] if _is_missing(image, images)]
    used = {at for images in groups.values() for image in images for at in (image.path, *image.path.parents)}
    cases = [_without_image_files(folder, root) for folder in _case_folders(root, folders) if folder not in used]
    cases += [_unreadable(error, root) for error in unreadable]
    for group, name in _names_of(groups, {case.name for case in cases}).items():
        cases += _cases_of(name, root.name, groups[group])
    _remark_on_links(cases, root)
    return tuple(_refuse_equal_names(cases))


def _remark_on_links(cases: Iterable[FoundCase], root: Path) -> None:
    """Say it where images are read through links that leave the dataset: of files or of folders, but for git-annex's own."""
    real = {path: real_path(path) for case in cases for path in case.files.values()}
    leaving = [path for path, at in real.items() if not at.is_relative_to(root) and not is_annexed(at)]
    if leaving:
        first = f"{leaving[0].relative_to(root)} is {real[leaving[0]]}"
        log.info("note: links that leave the dataset are followed, for %d images: %s", len(leaving), first)


def _names_of(groups: Mapping[tuple[str, ...], list[_Image]], taken: set[str]) -> dict[tuple[str, ...], str]:
    """What to call the case of each group: by its BIDS labels where they tell it from all others, else by where it lies."""
    holders: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for image in (image for images in groups.values() for image in images if image.labels):
        holders[image.labels[0]].add(image.holder)
    short = {group: max(image.labels for image in images) or group for group, images in groups.items()}
    often = Counter(short.values())
    names = {}
    for group, labels in short.items():
        alone = often[labels] == 1 and "/".join(labels) not in taken
        alone = alone and all(len(holders[label]) < 2 for label in labels[:1])
        names[group] = "/".join(labels if alone else group)
    return names


def _is_missing(dicom: _Image, images: list[_Image]) -> bool:
    """Whether something named like DICOM is there, and the image files beside it, of one case by their names, lack its modality."""
    alike = [image for image in images if not image.prefix or not dicom.prefix or image.prefix == dicom.prefix]
    if any(image.modality is dicom.modality for image in alike):
        return False
    inner = [path for path in dicom.path.rglob("*") if path.is_file()] if dicom.path.is_dir() else [dicom.path]
    # a folder of image files is named by modality too, and an archive in a contract's folder speaks for itself
    others = (image_suffix(path) or path.suffix.lower() == ARCHIVE for path in inner if path != dicom.path)
    return bool(inner) and not any(others)


def _cases_of(below: str, root: str, images: list[_Image]) -> Iterator[FoundCase]:
    """One case, or one for each prefix where a folder holds the images of several; never one of images that are named differently.

    It is called by where it lies below the root, or by the root.
    """
    name = below or root
    if odd := next((image for image in images if image.at_odds), None):
        refused = InputRefused(
            "a file's name and its folder name different cases",
            where=odd.path,
            do="put it where it belongs, or name the files of each case in a CSV worklist",
        )
        yield FoundCase(name, {image.modality: image.path for image in images}, refused)
        return
    prefixes = sorted({image.prefix for image in images})
    distinct = len({image.modality for image in images}) == len(images)
    if distinct and len(named := [prefix for prefix in prefixes if prefix]) > 1:
        refused = InputRefused(
            "the names of several cases lie where the images of one are expected",
            where=images[0].path.parent,
            found=f"{', '.join(sorted(image.path.name for image in images))}: begin with {', '.join(named)}",
            do="let the names of one case begin alike, or name the files of each case in a CSV worklist",
        )
        yield FoundCase(name, {image.modality: image.path for image in images}, refused)
    elif distinct or len(prefixes) == 1:
        yield _case(name, images)
    else:
        for prefix in prefixes:
            inner = "/".join(part for part in (below, prefix) if part)
            yield _case(inner or root, [image for image in images if image.prefix == prefix])


def _refuse_equal_names(cases: Iterable[FoundCase]) -> Iterator[FoundCase]:
    """The cases in the order of their names; those that share a name as one that is refused."""
    by_name: dict[str, list[FoundCase]] = defaultdict(list)
    for case in cases:
        by_name[case.name].append(case)
    for name, same in sorted(by_name.items()):
        if len(same) == 1:
            yield same[0]
            continue
        files = [case.files for case in same if case.files]
        refused = InputRefused(
            f"{len(same)} cases have one name",
            where=name,
            found=", ".join(str(path) for of_one in files for path in of_one.values()),
            do="rename files or folders of one of them, or name the cases in a CSV worklist",
        )
        yield FoundCase(name, files[0] if files else {}, refused)


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
    """What to tell of a case without DWI; an ADC that is not there may be computed of it."""
    if Modality.DWI in files:
        known = Modality.ADC in files or may_tell_b_values(files[Modality.DWI])
        return None if known else no_adc(files[Modality.DWI], "its b-values are not known")
    return InputRefused(
        "there is no DWI image",
        where=where,
        found=", ".join(str(path.name) for path in files.values()),
        do="DWI and ADC are both needed, or a DWI that holds b0 as well, with its b-values",
    )


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
        by_name = _MODALITY.match(_dicom_name(entry))
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


def _dicom_name(path: Path) -> str:
    return path.stem if path.suffix.lower() == ARCHIVE else path.name


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
        described = read_json(folder / "dataset_description.json")
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("DatasetType") == "derivative"


def _from_worklist(path: Path) -> tuple[FoundCase, ...]:
    """Cases of a table with the columns dwi, case, adc and flair (which may be missing or empty); paths are relative to it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter, restval=""))
        columns = {name.strip().lower() for name in rows[0]} if rows else set()
    except (UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise InputRefused(
            "the worklist is no table of text", where=path, found=str(error), do="save it as CSV, UTF-8"
        ) from error
    if "dwi" not in columns:
        raise _lacks_columns(path, columns)
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
    if "adc" not in columns and all(case.problem for case in cases.values()):
        raise _lacks_columns(path, columns)
    return tuple(cases[name] for name in sorted(cases))


def _lacks_columns(path: Path, columns: set[str]) -> InputRefused:
    return InputRefused(
        "the worklist lacks columns",
        where=path,
        found=", ".join(sorted(columns)) or "no row",
        do="name the columns case, dwi, adc, flair in the first line; only a DWI that holds b0 as well, with its b-values, needs no adc",
    )


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "an empty folder"
