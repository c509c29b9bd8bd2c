"""Members in a weights folder that has no manifest, by the layout of their files. Imports no torch.

Recognised: nnU-Net v2 and v1 trained-model folders at any depth, packed members, and DeepISLES' archive `weights/` as published.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.errors import WeightsBroken
from ensemble.families.names import distinct, name_of_path
from ensemble.families.nnunet_v1.folder import PLANS, WEIGHTS, fold_folders
from ensemble.families.spec import MemberSpec
from ensemble.files import is_there, read_json

#: Key of an nnU-Net v2 folder's dataset.json under which a member says how it wants its images, as a manifest entry would.
OWN_WORDS = "isles_ensemble"
#: What a packed member says of itself: a manifest entry.
PACKED = "member.json"
#: The folder of DeepISLES' archive that holds the winner's networks, the name they vote under, and the images they take.
_SEALS, _SEALS_NAME, _SEALS_CHANNELS = "SEALS", "seals", ("DWI", "ADC")
#: Folders of DeepISLES' archive whose networks can't be used yet: folder, file name's end, what they are.
_DEEPISLES_OTHERS = (("NVAUTO", ".ts", "TorchScript networks"), ("FACTORIZER", ".ckpt", "Lightning checkpoints"))
#: nnU-Net v1 puts each configuration into a folder of this name; only its 3d_fullres networks can be used.
_V1_OTHERS = ("2d", "3d_lowres", "3d_cascade_fullres")


@dataclass(frozen=True)
class Unsupported:
    """Weights that were recognised, and can't be used yet."""

    name: str
    folder: Path
    what: str


def members_by_layout(weights: Path) -> tuple[MemberSpec, ...]:
    """Members in the weights folder itself or any folder below it, in the order of their paths."""
    found = {path.parent: packed_member(path) for path in _called(weights, PACKED)}
    for path in _called(weights, "plans.json"):
        if is_there(path.parent / "dataset.json"):
            found.setdefault(path.parent, _nnunet_member(path.parent, weights))
    for folder in _v1_folders(weights):
        if _v1_configuration(folder, weights) not in _V1_OTHERS:
            published = _SEALS in folder.resolve().parts
            name = _SEALS_NAME if published else _path_name(folder, weights)
            channels = _SEALS_CHANNELS if published else None
            found.setdefault(folder, MemberSpec(name, "seals", folder, channels))
    folders = sorted(found)
    often = Counter(spec.name.lower() for spec in found.values())
    own = [found[folder].name for folder in folders]
    names = [
        name if often[name.lower()] == 1 else _path_name(at, weights) for name, at in zip(own, folders, strict=True)
    ]
    told = distinct(names, [folder.relative_to(weights).as_posix() for folder in folders])
    return tuple(replace(found[folder], name=name) for folder, name in zip(folders, told, strict=True))


def _called(weights: Path, name: str) -> list[Path]:
    """Everything below a folder that bears a name, links to nowhere too: a member of which not all was fetched is no absent one."""
    return [path for path in weights.rglob("*") if path.name == name]


def _nnunet_member(folder: Path, weights: Path) -> MemberSpec:
    """An nnU-Net v2 folder; one made for physical intensities says so itself, so that it is never run on others."""
    path = folder / "dataset.json"
    try:
        own = read_json(path).get(OWN_WORDS, {})
        return MemberSpec.from_json({**own, "name": _path_name(folder, weights), "kind": "nnunet"}, folder)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "dataset.json can't be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            do="give the file that stood beside these weights",
        ) from error


def unsupported_by_layout(weights: Path) -> tuple[Unsupported, ...]:
    """Weights below the folder that are known, and of no kind that can be used yet."""
    found = []
    for team, suffix, what in _DEEPISLES_OTHERS:
        files = sorted(path for path in weights.rglob(f"*{suffix}") if team in path.resolve().parts)
        if files:
            found.append(Unsupported(team, files[0].parent, f"{len(files)} {what}"))
    for folder in _v1_folders(weights):
        if (configuration := _v1_configuration(folder, weights)) in _V1_OTHERS:
            found.append(Unsupported(_path_name(folder, weights), folder, f"nnU-Net v1, {configuration}"))
    return tuple(found)


def packed_member(path: Path) -> MemberSpec:
    """The member that a packed folder's `member.json` describes. Raises WeightsBroken."""
    try:
        return MemberSpec.from_json(packed_entry(path.parent), path.parent)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise WeightsBroken(
            "the description of a packed member can't be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            do="pack the member again",
        ) from error


def packed_entry(folder: Path) -> dict[str, Any]:
    """The manifest entry in a packed folder; empty where there is none. Raises ValueError for what is no JSON object."""
    path = folder / PACKED
    return dict(read_json(path)) if is_there(path) else {}


def _v1_folders(weights: Path) -> list[Path]:
    """nnU-Net v1 model folders, also such as have lost part of their files."""
    of_weights = {path.parent.parent for path in _called(weights, WEIGHTS)}
    of_plans = {path.parent for path in _called(weights, PLANS) if fold_folders(path.parent)}
    return sorted(of_weights | of_plans)


def _v1_configuration(folder: Path, weights: Path) -> str:
    """The part of a path .../nnUNet/<configuration>/<task>/<trainer__plans> that names the configuration; empty elsewhere."""
    parts = folder.relative_to(weights.parent).parts
    return parts[-3] if len(parts) >= 3 else ""


def _path_name(folder: Path, weights: Path) -> str:
    return name_of_path(weights.resolve().name if folder == weights else folder.relative_to(weights).as_posix())
