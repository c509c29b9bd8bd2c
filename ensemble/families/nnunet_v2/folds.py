"""The checkpoints of an nnU-Net v2 trained-model folder, as trained (`fold_*/checkpoint_final.pth`) or packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ensemble.errors import WeightsBroken
from ensemble.files import parse_json
from ensemble.weights.checkpoints import read_checkpoint, unwrapped
from ensemble.weights.packed import SUFFIX, Precision, read_packed, write_packed

CHECKPOINT, PACKED_CHECKPOINT = "checkpoint_final.pth", f"checkpoint_final{SUFFIX}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The numbered folds' checkpoints, or that of fold_all, as nnUNetPredictor chooses them. Raises WeightsBroken when there is none."""
    for name in (CHECKPOINT, PACKED_CHECKPOINT):
        numbered = [path for path in folder.glob(f"fold_*/{name}") if path.parent.name[5:].isdecimal()]
        numbered.sort(key=lambda path: int(path.parent.name[5:]))
        if paths := numbered or list(folder.glob(f"fold_all/{name}")):
            return paths
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    raise WeightsBroken(
        f"a model folder holds no fold_*/{CHECKPOINT}",
        where=folder,
        found=", ".join(names[:8]) or "an empty folder",
        do="give a complete nnU-Net v2 model folder",
    )


def read_fold(path: Path) -> dict[str, Any]:
    """What a prediction needs of a checkpoint: network_weights, init_args, trainer_name, inference_allowed_mirroring_axes.

    Raises WeightsBroken.
    """
    if path.suffix == SUFFIX:
        weights, metadata = read_packed(path)
        try:
            return {"network_weights": weights} | {key: parse_json(text) for key, text in metadata.items()}
        except ValueError as error:
            raise WeightsBroken("packed weights are damaged", where=path, found=str(error)) from error
    content = read_checkpoint(path)
    if not isinstance(content.get("network_weights"), dict):
        raise WeightsBroken(
            "a checkpoint is not of nnU-Net v2",
            where=path,
            found=f"keys {', '.join(sorted(map(str, content))[:10])}; expected network_weights",
            do="give the checkpoint_final.pth that nnU-Net v2 wrote",
        )
    return content


def configuration_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Name of the configuration that a fold was trained in, if its checkpoint says so."""
    arguments = checkpoint.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    return name if isinstance(name, str) else None


def pack_fold(source: Path, target: Path, precision: Precision) -> None:
    """Write a checkpoint's weights, and what `read_fold` gives beside them. Raises WeightsBroken."""
    content = read_fold(source)
    kept = {
        "init_args": {"configuration": configuration_of(content)},
        "trainer_name": str(content.get("trainer_name", "")),
        "inference_allowed_mirroring_axes": content.get("inference_allowed_mirroring_axes"),
    }
    weights = {
        unwrapped(name): tensor for name, tensor in content["network_weights"].items() if torch.is_tensor(tensor)
    }
    write_packed(target, weights, {key: json.dumps(value) for key, value in kept.items()}, precision)
