"""Read and pack the weights of one fold of an nnU-Net v1 model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ensemble.families.nnunet_v1.folder import WEIGHTS
from ensemble.weights.checkpoints import read_trainer_checkpoint, strip_wrapper_prefixes
from ensemble.weights.packed import SUFFIX, PackedPrecision, read_packed, write_packed


def read_nnunet_v1_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the state dictionary in a `.model` file or its packed form. Raises WeightsBroken."""
    if path.suffix == SUFFIX:
        return read_packed(path)[0]
    state: Mapping[str, torch.Tensor] = read_trainer_checkpoint("nnU-Net v1", path, "state_dict", WEIGHTS)["state_dict"]
    return state


def pack_nnunet_v1_fold(source: Path, target: Path, precision: PackedPrecision) -> None:
    """Write a fold's weights in packed form; prefixes of parallel training are removed from names. Raises WeightsBroken."""
    weights = {strip_wrapper_prefixes(name): tensor for name, tensor in read_nnunet_v1_weights(source).items()}
    write_packed(target, weights, {}, precision)
