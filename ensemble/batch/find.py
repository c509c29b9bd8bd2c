"""Find the cases of a dataset: BIDS trees, contract-like folders, `<case>/{dwi,adc,flair}.*`, or a CSV worklist.

Nothing that looks like a case is passed over: a folder without usable images, or with too many, is a case with a problem.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ensemble.batch.channels import NEEDS_DESCRIPTION, ChannelNames, parse_nnunet_name
from ensemble.batch.grouping import fills_missing_modality, form_cases, name_groups, replace_equal_names
from ensemble.batch.layouts import FoundCase, FoundImage, classify_path, missing_image_error, modality_of_dicom_name
from ensemble.batch.walk import case_folders, unreadable_folder_case, walk
from ensemble.batch.worklist import read_worklist
from ensemble.errors import InputRefused
from ensemble.files import describe_folder, lexists, refuse_irregular_file, unreadable_reason
from ensemble.readers.dicom.read import is_read_as_dicom, modalities_in
from ensemble.readers.names import image_suffix
from ensemble.readers.sources import is_in_git_annex, real_path
from ensemble.types import Modality

log = logging.getLogger(__name__)


def find_cases(
    dataset: Path, out: Path, wanted: Callable[[FoundImage], bool] = lambda image: True
) -> tuple[FoundCase, ...]:
    """Return the cases of a dataset, sorted by name. The folder `out` is skipped.

    Images that are not `wanted` are skipped, and so are cases without any remaining image.

    Raises InputRefused when the dataset does not exist, can't be read, or contains no case.
    """
    try:
        if lexists(dataset) and not dataset.is_dir():
            refuse_irregular_file(dataset)
        found = read_worklist(dataset) if dataset.is_file() else _look_through(dataset, out, wanted)
    except OSError as error:
        where = Path(error.filename or dataset)
        why = unreadable_reason(where, error)
        raise InputRefused("the dataset can't be read", where=where, found=why.said, do=why.do) from error
    if not any(case.files for case in found):
        raise InputRefused(
            "the dataset contains no case",
            where=dataset,
            found=describe_folder(dataset) if dataset.is_dir() else "no row names a file",
            do=_layout_advice(dataset),
        )
    return found


def _layout_advice(dataset: Path) -> str:
    """Return how a dataset without any case should be arranged."""
    if not dataset.is_dir():
        return (
            "write the path of each case's DWI into the column 'dwi' (and into 'adc' and 'flair' those of the others)"
        )
    if any(map(parse_nnunet_name, dataset.rglob("*"))):
        return f"{NEEDS_DESCRIPTION}, or list the files in a .csv worklist"
    return (
        "arrange it as a BIDS tree, or as <case>/dwi.nii.gz and adc.nii.gz (flair.nii.gz is optional), or as in the ISLES'22 challenge"
        " (<case>/images/dwi-brain-mri/<file>), or list the files in a .csv with the columns 'case', 'dwi', 'adc' (and 'flair')"
    )


def find_only_case(folder: Path) -> tuple[str, Mapping[Modality, Path]]:
    """Return the name and files of the single case in a folder.

    Raises InputRefused if it contains no case, several, or an incomplete one.
    """
    cases = find_cases(folder, folder / "out")
    if len(cases) > 1:
        raise InputRefused(
            "the folder contains several cases",
            where=folder,
            found=", ".join(case.name for case in cases),
            do="give a folder with one case",
        )
    if (problem := cases[0].problem) is not None:
        raise problem
    return cases[0].name, cases[0].files


def _look_through(root: Path, out: Path, wanted: Callable[[FoundImage], bool]) -> tuple[FoundCase, ...]:
    root = root.resolve()
    if not root.is_dir():
        raise InputRefused("the dataset does not exist", where=root, do="check the path")
    groups: dict[tuple[str, ...], list[FoundImage]] = defaultdict(list)
    dicom: dict[tuple[str, ...], list[FoundImage]] = defaultdict(list)
    folders: set[Path] = set()
    passed_over: list[Path] = []
    unreadable: list[OSError] = []
    channels = ChannelNames(root)
    for folder, names in walk(root, out.resolve(), unreadable):
        folders.add(folder)
        for path in (folder / name for name in names):
            if image_suffix(path) and (image := classify_path(path, root, channels)):
                if wanted(image):
                    groups[image.group].append(image)
                else:
                    passed_over.append(path)
        for path in (*([folder] if folder != root else []), *(folder / name for name in names)):
            if not image_suffix(path) and (image := classify_path(path, root, channels)) and is_read_as_dicom(path):
                dicom[image.group].append(image)
    for group, images in groups.items():
        images += [image for image in dicom[group] if fills_missing_modality(image, images)]
    used = {at for images in groups.values() for image in images for at in (image.path, *image.path.parents)}
    used |= {at for path in passed_over for at in (path, *path.parents)}
    if passed_over:
        log.info("note: the BIDS filter excluded %d images, for example %s", len(passed_over), passed_over[0])
    cases = [_without_image_files(folder, root) for folder in case_folders(root, folders) if folder not in used]
    cases += [unreadable_folder_case(error, root) for error in unreadable]
    for group, name in name_groups(groups, {case.name for case in cases}).items():
        cases += form_cases(name, root.name, groups[group])
    _remark_on_links(cases, root)
    return tuple(replace_equal_names(cases))


def _remark_on_links(cases: Iterable[FoundCase], root: Path) -> None:
    """Log a note if images are read through links that leave the dataset (git-annex's own links excepted)."""
    real = {path: real_path(path) for case in cases for path in case.files.values()}
    leaving = [path for path, at in real.items() if not at.is_relative_to(root) and not is_in_git_annex(at)]
    if leaving:
        first = f"{leaving[0].relative_to(root)} is {real[leaving[0]]}"
        log.info(
            "note: %d images are read through links to files outside the dataset, for example %s", len(leaving), first
        )


def _without_image_files(folder: Path, root: Path) -> FoundCase:
    """Return the case of a folder without image files named by modality: a case of DICOM, or one with a problem."""
    name = folder.relative_to(root).as_posix()
    try:
        files = _dicom_by_name(folder) or dict.fromkeys(modalities_in(folder), folder)
    except InputRefused as problem:
        return FoundCase(name, problem=problem)
    if files:
        ordered = {modality: files[modality] for modality in Modality if modality in files}
        return FoundCase(name, ordered, missing_image_error(ordered, folder))
    unclear = any(map(parse_nnunet_name, folder.rglob("*")))
    refused = InputRefused(
        "the folder has no DWI and no ADC image",
        where=folder,
        found=describe_folder(folder),
        do=NEEDS_DESCRIPTION if unclear else "add both images, or remove the folder",
    )
    return FoundCase(name, problem=refused)


def _dicom_by_name(folder: Path) -> dict[Modality, Path]:
    """Return the DICOM folders and archives named by modality or as in the contract: `dwi/`, `adc.zip`, `images/dwi-brain-mri/`."""
    found: dict[Modality, Path] = {}
    for entry in sorted((*folder.glob("*"), *folder.glob("images/*"))):
        modality = modality_of_dicom_name(entry)
        if modality is None or not is_read_as_dicom(entry) or (entry.is_dir() and not any(entry.rglob("*"))):
            continue
        if modality in found:
            raise InputRefused(
                f"there is more than one {modality.label} image",
                where=folder,
                found=f"{found[modality].name}, {entry.name}",
                do="keep exactly one, or list the files in a CSV worklist",
            )
        found[modality] = entry
    return found
