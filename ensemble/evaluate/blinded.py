"""Reader study: an offline page that shows two masks per case blinded, and a key that says which method made which mask.

The page contains only images, and a left and a right mask for each case, in random order. The methods, the names of the cases and the
random choices are in the key only, so the page can't reveal them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble import __version__
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.methods import TRUTH, Method
from ensemble.evaluate.pairs import MaskPair, find_true_masks
from ensemble.evaluate.scores import read_mask
from ensemble.geometry import ROUNDING_VOXELS
from ensemble.outputs.report.parts import (
    grey_levels,
    page_script,
    page_template,
    script_safe_json,
    sheet_columns,
    slice_sheet,
)
from ensemble.outputs.report.run_report import RESEARCH_USE, TOOL
from ensemble.outputs.report.views import WINDOWS, brain_box
from ensemble.prepare.case import PreparedCase, prepare_for_run
from ensemble.publish import publish, write_json
from ensemble.readers.imagefile import read_case_files
from ensemble.text import replace_undecodable, replace_undecodable_in_json
from ensemble.types import AnyArray, BoolArray, Modality

KEY_SCHEMA = 1
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class DatasetImages:
    """The images of a dataset, by case name."""

    root: Path
    files: Mapping[str, Mapping[Modality, Path]]


@dataclass(frozen=True)
class ReaderStudyRequest:
    """What is needed to make a reader study: where page and key go, and the images to show."""

    page: Path
    key: Path
    images: DatasetImages


@dataclass(frozen=True)
class BlindedCase:
    """One case as readers see it: axial slices, radiological orientation, cropped to the brain and the masks."""

    case: str
    pixel_mm: tuple[float, float]
    """Width and height."""
    images: tuple[Mapping[str, str], ...]
    """Of each image its `name` and its `sheet` of slices."""
    masks: tuple[BoolArray, BoolArray]
    """(z, y, x), in the order of the study's methods."""


@dataclass(frozen=True)
class ReaderStudy:
    """A blinded page for readers, and the key that says which mask came from which method."""

    page: str
    key: dict[str, Any]


def mask_sources(methods: Sequence[Method]) -> tuple[str, str]:
    """Return the names of the two mask sources: two methods, or one method and the true masks. Raises UsageError for more."""
    if len(methods) > 2:
        raise UsageError(
            "a reader study compares exactly two masks per case",
            found=f"{len(methods)} methods",
            do="give one method (it is compared with the true masks) or two methods",
        )
    return methods[0].name, methods[1].name if len(methods) > 1 else TRUTH


def refuse_existing_study(page: Path, key: Path) -> None:
    """Raise UsageError if the page or key exists already: answers to a page can only be scored with the key made with it."""
    if page.resolve() == key.resolve():
        raise UsageError(
            "the page of the reader study and its key have the same path",
            where=page,
            do="give the key another name with --key",
        )
    for path in (page, key):
        if path.exists():
            raise UsageError(
                "a reader study already exists at this path",
                where=path,
                do="choose another path, or move the file away",
            )


def write_reader_study(study: ReaderStudy, page: Path, key: Path) -> None:
    """Write page and key, both or neither. Only the owner may read the key."""
    with publish(page.parent) as for_page, publish(key.parent) as for_key:
        (for_page / page.name).write_text(study.page, encoding="utf-8")
        (for_key / key.name).touch(mode=0o600)
        write_json(replace_undecodable_in_json(study.key), for_key / key.name)


def read_blinded_cases(
    methods: Sequence[Method], truths: Path, dataset: DatasetImages
) -> tuple[list[BlindedCase], list[str]]:
    """Read images and both masks of each case that has a mask of every method; also return why other cases were left out.

    Raises InputRefused if there is no such case.
    """
    dwi = {name: files[Modality.DWI] for name, files in dataset.files.items() if Modality.DWI in files}
    paths = [path for files in dataset.files.values() for path in files.values()]
    of_case = find_true_masks(dwi, dataset.root, truths, paths)
    names = {path: name for name, pair in of_case.items() for path in pair.truth if _only(pair)}
    shown, said = [], []
    for path, pair in methods[0].pairs.items():
        if any(path not in method.scores for method in methods):
            said.append(f"{pair.case} is not in the reader study: a method has no valid mask of it")
            continue
        try:
            if path not in names:
                ambiguous = any(path in matched.truth for matched in of_case.values())
                raise InputRefused(
                    f"case {pair.case} has {'several images that match equally well' if ambiguous else 'no images'}",
                    where=dataset.root,
                    found=f"mask {path}; cases with images: {', '.join(sorted(dwi)[:5])}" + " ..." * (len(dwi) > 5),
                    do="give the images of a case and its masks the same name",
                )
            shown.append(_shown(pair.case, path, methods, names[path], dataset.files[names[path]]))
        except InputRefused as error:
            said.append(f"{pair.case} is not in the reader study: {' '.join(str(error).split())}")
    if not shown:
        raise InputRefused(
            "none of the cases of the reader study can be shown",
            where=dataset.root,
            found=f"{len(said)} left out; the first: {said[0]}",
            do="make sure that each case has a valid mask of every method, and that --images is the dataset with the images of these masks",
        )
    return shown, said


def _only(pair: MaskPair) -> bool:
    return len(pair.truth) == 1 and len(pair.predictions) == 1


def _shown(case: str, truth: Path, methods: Sequence[Method], name: str, files: Mapping[Modality, Path]) -> BlindedCase:
    config = RunConfig()
    images = prepare_for_run(read_case_files(name, files), config, "cpu")
    paths = [method.pairs[truth].predictions[0] for method in methods] + [truth] * (len(methods) == 1)
    masks = []
    for path in paths:
        mask = read_mask(path, "mask")
        if not mask.grid.distance_voxels(images.grid) <= ROUNDING_VOXELS:
            raise InputRefused(
                "a mask has a different grid from the DWI",
                where=path,
                found=f"mask {mask.grid.describe()}; DWI ({files[Modality.DWI]}) {images.grid.describe()}",
                do="give the images on which the mask was made",
            )
        masks.append(mask.array)
    return make_blinded_case(case, images, (masks[0], masks[1]))


def make_blinded_case(case: str, images: PreparedCase, masks: tuple[BoolArray, BoolArray]) -> BlindedCase:
    """Cut slices and masks of a case for the page; `masks` are (z, y, x) on its grid."""
    canonical = images.grid.canonical()
    rows, columns = brain_box(canonical.apply(images.brain.array | masks[0] | masks[1]))
    spacing = canonical.spacing(images.grid.spacing_zyx_mm)

    def cut(array: AnyArray) -> AnyArray:
        return canonical.apply(array)[:, rows, columns]

    sheets = tuple(
        {
            "name": modality.label,
            "sheet": slice_sheet(grey_levels(cut(images.tissue_normalized[modality].array), window), lossless=False),
        }
        for modality, window in WINDOWS.items()
        if modality in images.tissue_normalized
    )
    return BlindedCase(case, (spacing[2], spacing[1]), sheets, (cut(masks[0]).copy(), cut(masks[1]).copy()))


def make_reader_study(cases: Sequence[BlindedCase], names: tuple[str, str], seed: str = "") -> ReaderStudy:
    """Shuffle the order of cases and the sides of the masks, and make page and key.

    `seed` (64 hexadecimal digits) is drawn by the system unless given; only the key contains it. All random choices are keyed hashes,
    so that those visible on the page (names and order of items) reveal nothing about the others.
    """
    seed = seed or secrets.token_hex(32)
    order = sorted(range(len(cases)), key=lambda number: _drawn(seed, f"order {number}"))
    items, entries = [], []
    for number in order:
        case, token, exchanged = cases[number], _token(seed, f"item {number}"), _drawn(seed, f"side {number}")[0] & 1
        left, right = case.masks[::-1] if exchanged else case.masks
        sides = names[::-1] if exchanged else names
        items.append({"item": token} | _viewer(case, left, right))
        entries.append({"item": token, "case": case.case, "left": sides[0], "right": sides[1]})
    key: dict[str, Any] = {
        "schema": KEY_SCHEMA,
        "tool": {"name": TOOL, "version": __version__},
        "study": _token(seed, "study"),
        "seed": seed,
        "methods": list(names),
        "items": entries,
    }
    return ReaderStudy(_page(key["study"], items), key)


def _drawn(seed: str, what: str) -> bytes:
    return hashlib.blake2b(what.encode(), key=bytes.fromhex(seed), digest_size=16).digest()


def _token(seed: str, what: str) -> str:
    """Return a seeded, meaningless name; of letters only, because spreadsheets turn `12e5` into a number."""
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in _drawn(seed, what))


def _page(study: str, items: Sequence[Mapping[str, Any]]) -> str:
    text: str = page_template("readers.html").render(
        notice=RESEARCH_USE,
        count=len(items),
        data=script_safe_json({"study": study, "items": items}),
        **page_script("slices.js", "readers.js"),
    )
    return replace_undecodable(text)


def _viewer(case: BlindedCase, left: BoolArray, right: BoolArray) -> dict[str, Any]:
    """Return the data that the page's script draws a case from. It opens at the slice where the two masks are largest."""
    slices, height, width = left.shape
    area = left.sum(axis=(1, 2)) + right.sum(axis=(1, 2))
    bits = np.stack([left, right, np.zeros_like(left)], axis=-1).astype(np.uint8) * 255
    return {
        "slices": slices,
        "height": height,
        "width": width,
        "columns": sheet_columns(slices),
        "pixel_mm": case.pixel_mm,
        "start": int(area.argmax()) if area.any() else slices // 2,
        "area": area.tolist(),
        "labels": slice_sheet(bits, lossless=True),
        "images": case.images,
    }
