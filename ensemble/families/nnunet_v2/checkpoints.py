"""Read and pack the checkpoints of an nnU-Net v2 trained-model folder (`fold_*/checkpoint_final.pth`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ensemble.errors import WeightsBroken
from ensemble.families.folds import ALL_FOLDS_V2, nnunet_fold_folders
from ensemble.families.nnunet_v2.plans import NnunetV2Plans, read_plans
from ensemble.files import error_in_words, parse_json
from ensemble.program import command_line
from ensemble.weights.checkpoints import read_trainer_checkpoint, strip_wrapper_prefixes
from ensemble.weights.folder import describe_weights_folder
from ensemble.weights.packed import SUFFIX, PackedPrecision, read_packed, write_packed

CHECKPOINT, PACKED_CHECKPOINT = "checkpoint_final.pth", f"checkpoint_final{SUFFIX}"


@dataclass(frozen=True)
class NnunetV2Folder:
    """A trained-model folder with all its files read."""

    folder: Path
    plans: NnunetV2Plans
    checkpoints: Mapping[Path, Mapping[str, Any]]
    """The result of `read_fold` for one fold."""


def read_nnunet_v2_folder(folder: Path) -> NnunetV2Folder:
    """Read a model folder. Raises WeightsBroken if anything is missing, damaged, contradictory or not supported."""
    checkpoints = {path: read_fold(path) for path in checkpoint_paths(folder)}
    names = {path: configuration_of(content) for path, content in checkpoints.items()}
    if len(set(names.values())) > 1:
        raise WeightsBroken(
            "the folds of the model folder were trained with different configurations",
            where=folder,
            found=", ".join(f"{path.parent.name}: {name}" for path, name in names.items()),
            do="keep one configuration per folder",
        )
    return NnunetV2Folder(folder, read_plans(folder, next(iter(names.values()))), checkpoints)


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of the numbered folds that have one; if none has, that of fold_all.

    Packed checkpoints count only where there is no .pth. Raises WeightsBroken when there is none.
    """
    numbered = [fold for name, fold in nnunet_fold_folders(folder, ALL_FOLDS_V2).items() if name != "all"]
    for name in (CHECKPOINT, PACKED_CHECKPOINT):
        for folds in (numbered, [folder / ALL_FOLDS_V2]):
            if paths := [fold / name for fold in folds if (fold / name).exists()]:
                return paths
    raise WeightsBroken(
        f"the model folder has no fold_*/{CHECKPOINT}",
        where=folder,
        found=describe_weights_folder(folder),
        do="give a complete nnU-Net v2 model folder",
    )


def read_fold(path: Path) -> dict[str, Any]:
    """Read the keys of a checkpoint that prediction needs: network_weights, init_args, trainer_name, inference_allowed_mirroring_axes.

    Raises WeightsBroken.
    """
    if path.suffix == SUFFIX:
        weights, metadata = read_packed(path)
        try:
            return {"network_weights": weights} | {key: parse_json(text) for key, text in metadata.items()}
        except ValueError as error:
            raise WeightsBroken(
                "the weights file of a packed member is damaged",
                where=path,
                found=error_in_words(error),
                do=f"copy it again, or make it again from the original weights: {command_line('members pack SRC DST')}",
            ) from error
    return read_trainer_checkpoint("nnU-Net v2", path, "network_weights", CHECKPOINT)


def configuration_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the name of the configuration that a fold was trained with; None if its checkpoint does not say."""
    arguments = checkpoint.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    return name if isinstance(name, str) else None


def pack_fold(source: Path, target: Path, precision: PackedPrecision) -> None:
    """Write a checkpoint's weights and the other keys that `read_fold` returns. Raises WeightsBroken."""
    content = read_fold(source)
    kept = {
        "init_args": {"configuration": configuration_of(content)},
        "trainer_name": str(content.get("trainer_name", "")),
        "inference_allowed_mirroring_axes": content.get("inference_allowed_mirroring_axes"),
    }
    weights = {
        strip_wrapper_prefixes(name): tensor
        for name, tensor in content["network_weights"].items()
        if torch.is_tensor(tensor)
    }
    write_packed(target, weights, {key: json.dumps(value) for key, value in kept.items()}, precision)
