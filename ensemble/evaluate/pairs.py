"""Which predicted mask belongs to which true one."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.readers.names import image_suffix, stem

_BIDS = re.compile(r"^sub-([A-Za-z0-9]+)(?:_ses-([A-Za-z0-9]+))?(?=_|$)")
#: What people call a mask, at the end of its name or as the whole of it.
_MASK = re.compile(r"(?:^|[_\-. ])(?:lesion[_\-]?)?(?:mask|msk|seg|segmentation|gt|truth|labels?|lesions?)$", re.I)
#: What is no mask of the lesion, though it lies beside one.
_OTHER = re.compile(r"(?:^|[_\-. ])(?:dwi|adc|flair|probability|probseg|votes|t1w?|t2w?|brain[_\-]?mask)$|_desc-", re.I)
#: Folders of a tree that hold something else than a mask of the case.
_PASSED_OVER = {"members", "superseded", "sourcedata", "code"}


@dataclass(frozen=True)
class Pair:
    """The masks of one case."""

    case: str
    truth: tuple[Path, ...]
    predictions: tuple[Path, ...]
    """One each, unless something is missing or ambiguous."""


def find_pairs(predictions: Path, truths: Path) -> tuple[list[Pair], list[str]]:
    """Pair the masks of two folders (or two files): one pair for each case with a true mask, and the cases that have none.

    Cases are matched by their BIDS labels; else by the file's name without words such as `_mask`; else, when that leaves nothing, by
    the name of its folder. Letters and digits count, punctuation does not. Raises InputRefused when nothing matches.
    """
    if predictions.is_file() and truths.is_file():
        return [Pair(stem(truths), (truths,), (predictions,))], []
    true, predicted = _masks_by_case(truths), _masks_by_case(predictions)
    if not set(true) & set(predicted):
        raise InputRefused(
            "no predicted mask belongs to a true one",
            where=predictions,
            found=f"predictions of {_some(predicted)}; true masks of {_some(true)}",
            do="name both by the case, for example sub-01_ses-1_mask.nii.gz, 01.nii.gz or 01/mask.nii.gz",
        )
    names = {key: paths[0][0] for key, paths in (predicted | true).items()}
    pairs = [
        Pair(names[key], tuple(path for _, path in true[key]), tuple(path for _, path in predicted.get(key, ())))
        for key in sorted(true)
    ]
    return pairs, [names[key] for key in sorted(set(predicted) - set(true))]


def _masks_by_case(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """Mask files below a folder, by what identifies their case, with the case's name for people."""
    if not root.exists():
        raise InputRefused("the folder does not exist", where=root, do="check the path")
    images = [root] if root.is_file() else [path for path in _files(root) if image_suffix(path)]
    candidates = [path for path in images if not _OTHER.search(stem(path))]
    masks = [path for path in candidates if _MASK.search(stem(path))] or candidates
    if not masks:
        raise InputRefused(
            "no mask was found",
            where=root,
            found=f"{len(images)} images",
            do="give a folder of masks (.nii.gz, .mha ...)",
        )
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in masks:
        name = case_name(path, root)
        found[re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("sub-").replace("_ses-", "ses"))].append((name, path))
    return found


def case_name(path: Path, root: Path) -> str:
    """The case that a mask file says it belongs to."""
    name = stem(path)
    if bids := _BIDS.match(name):
        return bids.group(0)
    folders = (path.relative_to(root) if path != root else Path(path.name)).parent.parts
    if "images" in folders[1:]:  # the contract's layout below a folder for each case
        return "_".join(folders[: folders.index("images")])
    return _MASK.sub("", name) or "_".join(folders) or name


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _PASSED_OVER)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _some(masks: dict[str, list[tuple[str, Path]]]) -> str:
    names = [paths[0][0] for paths in masks.values()]
    return ", ".join(names[:3]) + (f" ... ({len(names)} in all)" if len(names) > 3 else "")
