"""Pair each predicted mask with its true mask."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused
from ensemble.files import read_json
from ensemble.outputs.report.run_report import TOOL
from ensemble.readers.names import ARCHIVE, image_suffix, stem
from ensemble.text import replace_undecodable

_BIDS = re.compile(r"^sub-([A-Za-z0-9]+)(?:_ses-([A-Za-z0-9]+))?(?=_|$)")
_SUBJECT, _SESSION = re.compile(r"sub-([A-Za-z0-9]+)"), re.compile(r"ses-([A-Za-z0-9]+)")
_RUN = re.compile(r"_run-(\d+)(?=_|$)")
#: What people call a mask, at the end of its name or as the whole of it.
_MASK = re.compile(
    r"(?:^|[_\-. ])(?:(?:lesion|ground)[_\- ]?)?(?:mask|msk|seg|segmentation|gt|truth|labels?|lesions?)$", re.I
)
#: Files beside masks that are no lesion masks: images, brain masks, outputs of single members of a batch.
_OTHER = re.compile(
    r"(?:^|[_\-. ])(?:dwi|adc|flair|probability|probseg|votes|t1w?|t2w?|brain[_\-]?mask)$|_label-lesion_desc-|_desc-(?:votes|brain)",
    re.I,
)
_MODALITY = re.compile(r"(?:^|[_\-. ])(?:dwi|adc|flair)$", re.I)
#: Folders without masks of the case.
_PASSED_OVER = {"members", "superseded", "sourcedata", "code"}
#: Folders that name the kind of file, not the subject.
_KINDS = re.compile(
    r"anat|dwi|derivatives|rawdata|images|outputs?|results?|stroke-lesion-segmentation|labelsT[rs]"
    r"|(?:lesion[_\-]?)?(?:masks?|labels?|truths?|gt|segmentations?|lesions?)|ground[_\-]?truths?|pred(?:iction)?s?|predicted",
    re.I,
)

#: A name together with its parent folders.
Name = tuple[str, ...]
#: Subject, session (empty without), run.
Entities = tuple[str, str, int | None]


@dataclass(frozen=True)
class MaskPair:
    """The true and predicted masks of one case."""

    case: str
    truth: tuple[Path, ...]
    predictions: tuple[Path, ...]
    """One each, unless something is missing or ambiguous."""
    others: tuple[Path, ...] = ()
    """If this case has no prediction: predictions without a true mask, those with a similar name; if there are none, any."""


@dataclass(frozen=True)
class _Mask:
    """A mask file and what its path states about its case."""

    path: Path
    stored: Name
    """Its folders and its name, as they are."""
    names: tuple[Name, ...]
    """Possible names of its case, without suffixes such as `_mask`."""
    entities: Entities | None

    @property
    def above(self) -> Name:
        """The folders above its case, without those of subject and session."""
        return tuple(
            part for part in self.names[0][:-1] if not _SUBJECT.fullmatch(part) and not _SESSION.fullmatch(part)
        )

    @property
    def case(self) -> str:
        """The name of its case."""
        return bids.group(0) if (bids := _BIDS.match(stem(self.path))) else "/".join(self.names[0])


def find_pairs(predictions: Path, truths: Path, others: Sequence[Path] = ()) -> tuple[list[MaskPair], list[str]]:
    """Pair the masks of two folders (or two files). Returns a pair per case with a true mask, and the cases without one.

    Two masks belong together when their cases have one name: that of the file without words such as `_mask`, with the folders that it
    lies in as far as both have some; what a batch wrote goes by the names in its reports. Else, when sub, ses and run of their BIDS
    names are equal. Names are equal when all their characters are, in whichever Unicode form. What lies below `others`, folders of other
    methods' predictions, is no true mask. Raises InputRefused when nothing matches.
    """
    if predictions.is_file() and truths.is_file():
        return [MaskPair(stem(truths), (truths,), (predictions,))], []
    inner, outer = predictions.resolve(), truths.resolve()
    if inner != outer and outer.is_relative_to(inner):
        raise InputRefused(
            "the folder of true masks lies inside the folder of predictions",
            where=predictions,
            found=str(truths),
            do="give a folder that contains only predicted masks",
        )
    predicted = _masks(predictions)
    apart = [place for one in (predictions, *others) if (place := one.resolve()) != outer]
    true = [mask for mask in _masks(truths) if not any(mask.path.resolve().is_relative_to(place) for place in apart)]
    groups, true, predicted = _together(true, predicted)
    pairs = [MaskPair(group[0][0].case, *(tuple(mask.path for mask in side) for side in group)) for group in groups]
    if not pairs:
        raise InputRefused(
            "no predicted mask matches a true mask by name",
            where=predictions,
            found=f"predictions {_some(predicted)}; true masks {_some(true)}",
            do="name both after the case, for example sub-01_ses-1_mask.nii.gz, 01.nii.gz or 01/mask.nii.gz",
        )
    pairs += [MaskPair(mask.case, (mask.path,), (), _similar(mask, predicted)) for mask in true]
    return sorted(pairs, key=lambda pair: (pair.case, pair.truth)), sorted(mask.case for mask in predicted)


def find_true_masks(
    cases: Mapping[str, Path], root: Path, truths: Path, passed_over: Collection[Path]
) -> dict[str, MaskPair]:
    """Return the true masks in a folder by case, matched by the names of case and DWI. Predictions of this program are skipped.

    Args:
        cases: DWI by the case's name.
        root: the dataset, whose folders name the cases.
        passed_over: files that are not masks: the images themselves.

    Returns pairs whose `predictions` are the DWIs of all cases that the masks may belong to.
    """
    wanted = {_of_case(name, dwi, root): name for name, dwi in cases.items()}
    others, ours = {path.resolve() for path in passed_over}, cache(_is_ours)
    found = [mask for mask in _masks(truths) if mask.path.resolve() not in others and not ours(mask.path.parent)]
    groups, _, _ = _together(found, list(wanted))
    return {
        wanted[case]: MaskPair(wanted[case], tuple(mask.path for mask in masks), tuple(one.path for one in several))
        for masks, several in groups
        for case in several
    }


def _is_ours(folder: Path) -> bool:
    """Return whether a folder holds a report of this program: the masks beside it are predictions."""
    try:
        return bool(read_json(folder / "report.json")["tool"]["name"] == TOOL)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _of_case(name: str, dwi: Path, root: Path) -> _Mask:
    """Return a case as if its DWI were a predicted mask."""
    path = dwi.relative_to(root.resolve()) if dwi.is_relative_to(root.resolve()) else Path(dwi.name)
    folders, own = path.parent.parts, _own_name(path)
    names = [_spelt(name.split("/")), *_names_of(folders, own, _MODALITY)]
    labelled = path if _BIDS.match(path.name) else Path(name)
    return _Mask(dwi, _spelt((*folders, own)), tuple(dict.fromkeys(names)), _entities(labelled))


def _together(
    true: Sequence[_Mask], predicted: Sequence[_Mask]
) -> tuple[list[tuple[list[_Mask], list[_Mask]]], list[_Mask], list[_Mask]]:
    """Return groups of masks of one case, and the unmatched masks of either side."""
    found: list[tuple[list[_Mask], list[_Mask]]] = []
    sites = {part for mask in true for part in mask.above} & {part for mask in predicted for part in mask.above}
    for related in (_stored, _named, _named_below, partial(_same_entities, sites=sites)):
        groups = _groups(true, predicted, related)
        found += groups
        taken = {mask for group in groups for side in group for mask in side}
        true, predicted = ([mask for mask in side if mask not in taken] for side in (true, predicted))
    return found, list(true), list(predicted)


# Keys under which two masks are related: each function gives those of a mask; for the third, names and all ends of names.


def _stored(mask: _Mask, whole: bool) -> Iterable[Any]:
    return [mask.stored]


def _named(mask: _Mask, whole: bool) -> Iterable[Any]:
    return mask.names


def _named_below(mask: _Mask, whole: bool) -> Iterable[Any]:
    return mask.names if whole else {name[start:] for name in mask.names for start in range(len(name))}


def _same_entities(mask: _Mask, whole: bool, sites: set[str]) -> Iterable[Any]:
    """Return BIDS entities per site: a folder that both trees have names the site, and each site may have a sub-01."""
    return [(mask.entities, tuple(part for part in mask.above if part in sites))] if mask.entities else []


def _groups(
    true: Sequence[_Mask], predicted: Sequence[_Mask], keys: Callable[[_Mask, bool], Iterable[Any]]
) -> list[tuple[list[_Mask], list[_Mask]]]:
    """Return groups of related true and predicted masks. A group with more than one of either is ambiguous."""
    leader: dict[_Mask, _Mask] = {mask: mask for mask in (*true, *predicted)}

    def lead(mask: _Mask) -> _Mask:
        while leader[mask] is not mask:
            mask = leader[mask]
        return mask

    for one_side, other_side in ((true, predicted), (predicted, true)):
        by_key: dict[Any, list[_Mask]] = defaultdict(list)
        for mask in one_side:
            for key in keys(mask, True):
                by_key[key].append(mask)
        for mask in other_side:
            for key in keys(mask, False):
                for partner in by_key.get(key, ()):
                    leader[lead(partner)] = lead(mask)
    groups: dict[_Mask, tuple[list[_Mask], list[_Mask]]] = defaultdict(lambda: ([], []))
    for side, masks in enumerate((true, predicted)):
        for mask in masks:
            groups[lead(mask)][side].append(mask)
    return [group for group in groups.values() if group[0] and group[1]]


def _masks(root: Path) -> list[_Mask]:
    """Return the mask files below a folder."""
    if not root.exists():
        raise InputRefused("the folder of masks does not exist", where=root, do="check the path")
    images = [root] if root.is_file() else [path for path in _files(root) if image_suffix(path)]
    candidates = [path for path in images if not _OTHER.search(stem(path))]
    masks = [path for path in candidates if _MASK.search(stem(path))] or candidates
    if not masks:
        raise InputRefused(
            "the folder contains no lesion mask",
            where=root,
            found=f"{len(images)} images, each named as something else (DWI, brain mask, probability ...)"
            if images
            else "no image (.nii.gz, .mha ...)",
            do="give a folder of lesion masks named after the case, for example sub-01_mask.nii.gz or 01.nii.gz",
        )
    report = cache(_report)
    return [_mask(path, root, report(path.parent)) for path in masks]


def _mask(path: Path, root: Path, report: dict[str, Any]) -> _Mask:
    folders = (path.relative_to(root) if path != root else Path(path.name)).parent.parts
    stored = _spelt((*folders, stem(path)))
    if report:  # the labels of a batch's output may have lost the difference between two cases
        name, dwi = str(report["case"]["name"]), Path(report["case"]["files"]["dwi"])
        names = [_spelt(name.split("/")), *_names_of(dwi.parent.parts, _own_name(dwi), _MODALITY)]
        labelled = dwi if _BIDS.match(dwi.name) else Path(name)
        return _Mask(path, stored, tuple(dict.fromkeys(names)), _entities(labelled))
    above = root.resolve() if root.is_dir() else root.resolve().parent
    names = list(_names_of(folders, stem(path), _MASK)) or [_spelt([above.name])]
    return _Mask(path, stored, tuple(names), _entities(Path(*folders, stem(path))))


def _names_of(folders: Sequence[str], name: str, words: re.Pattern[str]) -> Iterator[Name]:
    """Yield the possible case names of a file by its path, without words such as "mask" that only describe the file."""
    whose = [folder for folder in folders if not _KINDS.fullmatch(folder)]
    if own := words.sub("", name):
        if len(folders) > 2 and folders[-2] == "images":  # the contract's layout below a folder for each case
            yield _spelt([folder for folder in folders[:-2] if folder in whose])
        yield _spelt([*whose, own])
    elif whose:
        yield _spelt(whose)


def _own_name(image: Path) -> str:
    """Return the name of an image file, DICOM folder or archive without its suffix."""
    return stem(image) if image_suffix(image) or image.suffix.lower() == ARCHIVE else image.name


def _entities(path: Path) -> Entities | None:
    """Return subject, session and run from BIDS labels of the file name, else of its folders."""
    name, own = path.name, _BIDS.match(path.name)
    subjects = [own] if own else [found for part in reversed(path.parts) if (found := _SUBJECT.fullmatch(part))]
    if not subjects:
        return None
    sessions = [found[1] for part in reversed(path.parts) if (found := _SESSION.fullmatch(part))]
    session = (own and own[2]) or next(iter(sessions), "")
    run = _RUN.search(name) if own else None
    return subjects[0][1], session, int(run[1]) if run else None


def _report(folder: Path) -> dict[str, Any]:
    """Return the report that a batch wrote beside a mask; empty if there is none."""
    try:
        report = read_json(folder / "report.json")
        said = report["batch"], report["case"]["name"], report["case"]["files"]["dwi"]
        return report if all(said) and isinstance(said[2], str) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _spelt(parts: Iterable[str]) -> Name:
    """Return the parts in one Unicode normal form; undecodable bytes are spelt as reports spell them."""
    return tuple(unicodedata.normalize("NFC", replace_undecodable(part)) for part in parts)


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _PASSED_OVER)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _similar(mask: _Mask, others: Sequence[_Mask]) -> tuple[Path, ...]:
    """Return up to three masks for a message: those with similar names; if there are none, any."""
    alike = [other for other in others if _lossy(other) == _lossy(mask)]
    return tuple(other.path for other in (alike or others)[:3])


def _lossy(mask: _Mask) -> str:
    letters = unicodedata.normalize("NFKD", mask.names[0][-1].casefold().removeprefix("sub-"))
    return re.sub(r"[\W_]|(?<!\d)0+(?=\d)", "", letters)


def _some(masks: Sequence[_Mask]) -> str:
    return ", ".join(str(mask.path) for mask in masks[:3]) + (f" ... ({len(masks)} in all)" if len(masks) > 3 else "")
