"""Turns members of any kind into safetensors and JSON: no pickle is left to load, and optimizer states stay behind.

A packed folder says in `member.json` what a manifest entry says, digests included, so that it is recognised wherever it is put.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.families.nnunet_v1.checkpoints import pack_v1_fold, read_v1_weights
from ensemble.families.nnunet_v1.folder import PACKED_PLANS, PACKED_WEIGHTS, read_v1_folder
from ensemble.families.nnunet_v1.network import build_generic_unet
from ensemble.families.nnunet_v2.folds import (
    PACKED_CHECKPOINT,
    checkpoint_paths,
    configuration_of,
    pack_fold,
    read_fold,
)
from ensemble.families.nnunet_v2.plans import read_plans
from ensemble.families.spec import MemberSpec
from ensemble.folders import sole_writer
from ensemble.members.discovery import PACKED
from ensemble.members.manifest import MANIFEST, file_sha256, find_members, verify_files
from ensemble.publish import publish, write_json
from ensemble.weights.checkpoints import load_weights
from ensemble.weights.onnx_form import write_onnx
from ensemble.weights.packed import Precision


def pack(
    source: Path,
    destination: Path,
    precision: Precision,
    names: tuple[str, ...] | None = None,
    *,
    onnx: bool = False,
) -> list[Path]:
    """Pack a member folder, or each member of a weights folder (those named, if any), into a new folder.

    A member folder becomes `destination` itself, the members of a weights folder become folders in it. A member folder named by a
    manifest beside it keeps what that says of it. With `onnx` each network is also written in ONNX form, as it is in the packed
    precision. Returns the packed folders; on failure nothing is left behind.

    Raises WeightsBroken for members that can't be read, UsageError when the destination holds something already.
    """
    specs = _beside(source) or find_members(source, names)
    alone = len(specs) == 1 and specs[0].folder.resolve() == source.resolve()
    places = ["." if alone else spec.name for spec in specs]
    with sole_writer(destination):
        if any(destination.iterdir()):
            raise UsageError("the destination of a packed member must be new or empty", where=destination)
        with publish(destination) as staging:
            for spec, place in zip(specs, places, strict=True):
                _pack_member(spec, staging / place, precision, onnx)
    return [destination / place for place in places]


def _beside(source: Path) -> tuple[MemberSpec, ...]:
    """The entry for a member folder in the manifest of a weights folder above it."""
    for weights in source.resolve().parents:
        if (weights / MANIFEST).is_file() and not (source / MANIFEST).is_file():
            return tuple(spec for spec in find_members(weights) if spec.folder.resolve() == source.resolve())
    return ()


def _pack_member(spec: MemberSpec, folder: Path, precision: Precision, onnx: bool) -> None:
    verify_files(spec)
    folder.mkdir(parents=True, exist_ok=True)
    _PACKERS[spec.kind](spec.folder, folder, precision)
    if onnx:
        _ONNX_WRITERS[spec.kind](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    entry = replace(spec, sha256=digests).as_json()
    write_json(entry | {"precision": precision}, folder / PACKED)


def _pack_nnunet(source: Path, target: Path, precision: Precision) -> None:
    for path in checkpoint_paths(source):
        fold = target / path.parent.name
        fold.mkdir()
        pack_fold(path, fold / PACKED_CHECKPOINT, precision)
    for name in ("dataset.json", "plans.json"):
        shutil.copyfile(source / name, target / name)


def _pack_seals(source: Path, target: Path, precision: Precision) -> None:
    folder = read_v1_folder(source)
    for path in folder.weights.values():
        fold = target / path.parent.name
        fold.mkdir()
        pack_v1_fold(path, fold / PACKED_WEIGHTS, precision)
    write_json(folder.plans.as_json(), target / PACKED_PLANS)


def _write_nnunet_onnx(packed: Path) -> None:
    from ensemble.families.nnunet_v2.network import build_network

    for path in checkpoint_paths(packed):
        content = read_fold(path)
        plans = read_plans(packed, configuration_of(content))
        channels = len(plans.channel_names)
        network = build_network(plans.architecture, channels, plans.classes, content["trainer_name"])
        load_weights(network, content["network_weights"], path)
        write_onnx(network, channels, plans.smallest_window, path.parent)


def _write_seals_onnx(packed: Path) -> None:
    folder = read_v1_folder(packed)
    for path in folder.weights.values():
        network = build_generic_unet(folder.plans)
        load_weights(network, read_v1_weights(path), path)
        write_onnx(network, len(folder.plans.modalities), folder.plans.smallest_window, path.parent)


_PACKERS: Mapping[str, Callable[[Path, Path, Precision], None]] = {"nnunet": _pack_nnunet, "seals": _pack_seals}
_ONNX_WRITERS: Mapping[str, Callable[[Path], None]] = {"nnunet": _write_nnunet_onnx, "seals": _write_seals_onnx}
