"""Read and pack the weights of one network of SWAN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ensemble.errors import WeightsBroken
from ensemble.families.base import NetworkSpec
from ensemble.families.swan.folder import SwanFolder
from ensemble.families.swan.network import ARCHITECTURES, CHANNELS, HEAD, WIDTHS, WINDOW
from ensemble.families.unet import window_bytes
from ensemble.weights.checkpoints import load_weights
from ensemble.weights.lightning import read_state_dict
from ensemble.weights.packed import SUFFIX, PackedPrecision, read_packed, write_packed

SPACING_MM = (2.0, 2.0, 2.0)
#: What Lightning's module calls the network.
_MODULE = "net."
_LEVEL = re.compile(r"encoder\.blocks\.(\d+)\.blocks\.0\.weight")
_HEAD = re.compile(r"heads\.(\d+)\.weight")


def read_swan_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the state dictionary of a checkpoint or its packed form, with the network's own names. Raises WeightsBroken."""
    if path.suffix == SUFFIX:
        return read_packed(path)[0]
    return {name.removeprefix(_MODULE): tensor for name, tensor in read_state_dict(path).items()}


def pack_swan_network(source: Path, target: Path, precision: PackedPrecision) -> None:
    """Write a checkpoint's weights as a safetensors file (the packed form: tensors and text, no code).

    fp32 is lossless; fp16 rounds the kernels. Raises WeightsBroken.
    """
    write_packed(target, read_swan_weights(source), {}, precision)


def network_specs(folder: SwanFolder) -> tuple[NetworkSpec, ...]:
    """Describe the networks of all folds, one architecture after the other, without building them."""
    return tuple(
        NetworkSpec(
            weights=path,
            channels=CHANNELS,
            spacing_mm=SPACING_MM,
            patch=WINDOW,
            smallest_window=WINDOW,
            window_bytes=window_bytes(WINDOW, WIDTHS[0]),
            memory_of=f"{WIDTHS[0]} feature maps",
            build=partial(_with_weights, kind, path),
            convert=False,
        )
        for (_, kind), path in folder.weights.items()
    )


def _with_weights(kind: str, path: Path) -> nn.Module:
    weights = read_swan_weights(path)
    network = ARCHITECTURES[kind](*_sizes(weights, kind, path))
    load_weights(network, weights, path)
    return network


def _sizes(weights: Mapping[str, torch.Tensor], kind: str, path: Path) -> tuple[list[int], int]:
    """Return the number of feature maps of each level, and the number of heads.

    Raises WeightsBroken for a network of another make than the published ones.
    """
    levels = {int(match[1]): len(weights[name]) for name in weights if (match := _LEVEL.fullmatch(name))}
    heads = sum(_HEAD.fullmatch(name) is not None for name in weights)
    stem = tuple(weights["stem.weight"].shape) if "stem.weight" in weights else ()
    widths = [*stem[:1], *(levels[level] for level in sorted(levels) if level > 0)]
    fits = len(stem) == 5 and stem[1] == CHANNELS and 1 <= heads < len(widths) == len(WIDTHS)
    if not fits or any(not 0 < width <= most or width % HEAD for width, most in zip(widths, WIDTHS, strict=True)):
        raise WeightsBroken(
            f"the checkpoint of SWAN's network {kind} has another architecture",
            where=path,
            found=f"first layer of shape {stem}, levels of {', '.join(map(str, widths))} feature maps, {heads} output heads",
            do=f"use the published checkpoint: {CHANNELS} input images, levels of {', '.join(map(str, WIDTHS))} feature maps",
        )
    return widths, heads
