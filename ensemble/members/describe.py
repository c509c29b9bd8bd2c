"""What a member's files say of it before they are loaded. Imports no torch: listing members is cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import WeightsBroken
from ensemble.families.nnunet_v1.folder import fold_folders, read_v1_folder
from ensemble.families.nnunet_v2.plans import read_plans
from ensemble.families.spec import MemberSpec


@dataclass(frozen=True)
class Description:
    """One member, for a table."""

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


def describe(spec: MemberSpec) -> Description:
    """Read the cheap files of a member. What can't be read is empty, with a remark: whether a member loads, loading it tells."""
    try:
        channels, spacing = _READERS.get(spec.kind, _nothing)(spec)
        remarks = _missing_folds(folds := _folds(spec.folder))
    except WeightsBroken as error:
        channels, spacing, folds = (), (), _folds(spec.folder)
        remarks = (f"{error.what}: {error.found or error.where}",)
    sizes = [path.stat().st_size for path in spec.folder.rglob("*") if path.is_file()]
    modalities = dict.fromkeys(channel.partition("[")[0].strip().upper() for channel in spec.channels or channels)
    return Description(folds, tuple(modalities), spec.spacing_mm or spacing, sum(sizes), remarks)


def _folds(folder: Path) -> tuple[str, ...]:
    return tuple(fold_folders(folder)) or tuple(path.name[5:] for path in folder.glob("fold_all"))


def _missing_folds(folds: tuple[str, ...]) -> tuple[str, ...]:
    """Folds are numbered from 0; a gap is no error, but another prediction than that of the whole model."""
    numbers = {int(fold) for fold in folds if fold.isdecimal()}
    gaps = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    return (f"without fold {', '.join(map(str, gaps))}",) if gaps else ()


def _of_nnunet(spec: MemberSpec) -> tuple[tuple[str, ...], tuple[float, ...]]:
    plans = read_plans(spec.folder, None)
    return plans.channel_names, plans.spacing_mm


def _of_seals(spec: MemberSpec) -> tuple[tuple[str, ...], tuple[float, ...]]:
    plans = read_v1_folder(spec.folder).plans
    return plans.modalities, plans.spacing_mm


def _nothing(_: MemberSpec) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return (), ()


_READERS: Mapping[str, Callable[[MemberSpec], tuple[tuple[str, ...], tuple[float, ...]]]] = {
    "nnunet": _of_nnunet,
    "seals": _of_seals,
}
