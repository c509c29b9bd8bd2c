"""Weights of one fold of an nnU-Net v1 model, as published or packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ensemble.errors import WeightsBroken
from ensemble.weights.checkpoints import read_checkpoint, unwrapped
from ensemble.weights.packed import SUFFIX, Precision, read_packed, write_packed


def read_v1_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """The state dictionary in a `.model` file or its packed form. Raises WeightsBroken."""
    if path.suffix == SUFFIX:
        return read_packed(path)[0]
    content = read_checkpoint(path)
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise WeightsBroken(
            "a checkpoint is not of nnU-Net v1",
            where=path,
            found=f"keys {', '.join(sorted(map(str, content))[:10])}; expected state_dict",
            do="give the model_final_checkpoint.model that nnU-Net v1 wrote",
        )
    return state


def pack_v1_fold(source: Path, target: Path, precision: Precision) -> None:
    """Write a fold's weights in packed form; names lose the prefixes of parallel training. Raises WeightsBroken."""
    weights = {unwrapped(name): tensor for name, tensor in read_v1_weights(source).items()}
    write_packed(target, weights, {}, precision)
