"""Group images into cases and name the cases; images with different case names never form one case."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ensemble.batch.choice import choose_images
from ensemble.batch.layouts import FoundCase, FoundImage, missing_image_error
from ensemble.errors import InputRefused
from ensemble.readers.names import ARCHIVE, image_suffix
from ensemble.types import Modality


def name_groups(groups: Mapping[tuple[str, ...], list[FoundImage]], taken: set[str]) -> dict[tuple[str, ...], str]:
    """Return a case name for each group of images: its BIDS labels if they are unique and not `taken`, else its path."""
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


def fills_missing_modality(dicom: FoundImage, images: list[FoundImage]) -> bool:
    """Return whether a folder or archive, named like DICOM, supplies a modality that the image files beside it lack."""
    alike = [image for image in images if not image.prefix or not dicom.prefix or image.prefix == dicom.prefix]
    if any(image.modality is dicom.modality for image in alike):
        return False
    inner = [path for path in dicom.path.rglob("*") if path.is_file()] if dicom.path.is_dir() else [dicom.path]
    # a folder of image files is named by modality too, and an archive in a contract's folder speaks for itself
    others = (image_suffix(path) or path.suffix.lower() == ARCHIVE for path in inner if path != dicom.path)
    return bool(inner) and not any(others)


def form_cases(below: str, root: str, images: list[FoundImage]) -> Iterator[FoundCase]:
    """Yield the cases of a folder: one, or one per name prefix. Images with different case names never form one case.

    A case is named after its path below the root, or after the root.
    """
    name = below or root
    if odd := next((image for image in images if image.at_odds), None):
        refused = InputRefused(
            "the name of a file and the name of its folder belong to different cases",
            where=odd.path,
            found=f"file {odd.path.name}, folder {odd.path.parent.name}",
            do="move the file to the folder of its case, or list the files of each case in a CSV worklist",
        )
        yield FoundCase(name, {image.modality: image.path for image in images}, refused)
        return
    prefixes = sorted({image.prefix for image in images})
    distinct = len({image.modality for image in images}) == len(images)
    if distinct and len(named := [prefix for prefix in prefixes if prefix]) > 1:
        refused = InputRefused(
            "a folder that should hold the images of one case has images of several",
            where=images[0].path.parent,
            found=f"{', '.join(sorted(image.path.name for image in images))}: the names begin with {', '.join(named)}",
            do="give all images of a case the same name prefix, or list the files of each case in a CSV worklist",
        )
        yield FoundCase(name, {image.modality: image.path for image in images}, refused)
    elif distinct or len(prefixes) == 1:
        yield _case(name, images)
    else:
        for prefix in prefixes:
            inner = "/".join(part for part in (below, prefix) if part)
            yield _case(inner or root, [image for image in images if image.prefix == prefix])


def replace_equal_names(cases: Iterable[FoundCase]) -> Iterator[FoundCase]:
    """Yield the cases sorted by name; cases that share a name are replaced by one refused case."""
    by_name: dict[str, list[FoundCase]] = defaultdict(list)
    for case in cases:
        by_name[case.name].append(case)
    for name, same in sorted(by_name.items()):
        if len(same) == 1:
            yield same[0]
            continue
        files = [case.files for case in same if case.files]
        refused = InputRefused(
            f"{len(same)} cases have the same name",
            where=name,
            found=", ".join(str(path) for of_one in files for path in of_one.values()),
            do="rename files or folders of one of them, or name the cases in a CSV worklist",
        )
        yield FoundCase(name, files[0] if files else {}, refused)


def _case(name: str, images: list[FoundImage]) -> FoundCase:
    choice = choose_images(images)
    files = {modality: choice.taken[modality].path for modality in Modality if modality in choice.taken}
    for modality, several in choice.undecided.items():
        refused = InputRefused(
            f"there is more than one {modality.label} image",
            where=several[0].path.parent,
            found=", ".join(sorted(image.path.name for image in images if image.modality is modality)),
            do="keep exactly one, or list the files to use in a CSV worklist",
        )
        return FoundCase(name, files, refused)
    return FoundCase(name, files, missing_image_error(files, images[0].path.parent), choice.notes)
