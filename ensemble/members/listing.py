"""Describe members from their small files, without loading them. Imports no torch, so listing members is fast."""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.errors import WeightsBroken
from ensemble.families.base import MemberDescription
from ensemble.families.registry import family_of
from ensemble.families.spec import MemberSpec
from ensemble.weights.folder import convert_folder_errors, weights_files


@dataclass(frozen=True)
class MemberSummary:
    """One row of the table of members."""

    folds: tuple[str, ...]
    """Names of its folds: "0", "1", ... or "all"."""
    images: tuple[str, ...]
    """What its channels show, each modality once."""
    spacing_mm: tuple[float, ...]
    """That its networks work at; in-plane for 2-D networks."""
    size_bytes: int
    """Of all its files."""
    remarks: tuple[str, ...]
    """What is missing or odd."""


def describe_member(spec: MemberSpec) -> MemberSummary:
    """Return what the small files of a member (plans, JSON) say. Fields that they do not state stay empty, with a remark.

    Only loading shows whether the member works.

    Raises WeightsBroken for a folder that can't be read.
    """
    with convert_folder_errors(spec.folder):
        size = sum(path.stat().st_size for path in weights_files(spec.folder) if path.is_file())
        shown, folds, remarks = MemberDescription((), ()), tuple[str, ...](), tuple[str, ...]()
        try:
            family = family_of(spec)
            folds = family.folds(spec.folder)
            shown = family.describe(spec.folder)
            remarks = shown.remarks or _missing_folds(folds, shown.published)
        except WeightsBroken as error:
            remarks = (f"{error.what}: {error.found or error.where}",)
    modalities = dict.fromkeys(channel.partition("[")[0].strip().upper() for channel in spec.channels or shown.channels)
    return MemberSummary(folds, tuple(modalities), spec.spacing_mm or shown.spacing_mm, size, remarks)


def _missing_folds(folds: tuple[str, ...], published: int) -> tuple[str, ...]:
    """Return the names of the missing folds.

    They are numbered from 0; a missing one is no error, but another prediction than that of the whole model.
    """
    numbers = {int(fold) for fold in folds if fold.isdecimal()}
    expected = max(max(numbers, default=-1) + 1, published if numbers else 0)
    gaps = sorted(set(range(expected)) - numbers)
    return (f"without fold {', '.join(map(str, gaps))}",) if gaps else ()
