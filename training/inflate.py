"""Start a 3-D member from a 2-D one, or one that sees FLAIR from one that does not: `python -m training.inflate SOURCE MEMBER --out DIR`.

Kernels (y, x) become (z, y, x), with their weights in the middle slice (inflation, Carreira and Zisserman, CVPR 2017, without their
division by the depth: all other slices begin at zero). Where images are alike in all slices, the new network answers as the old one.
Training then goes on from it (`python -m training.train MEMBER --start-from DIR --frozen-norm`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ensemble.config import SHIPPED_WEIGHTS
from ensemble.families.channels import parse_channel
from ensemble.weights.checkpoints import read_checkpoint
from training.members import MEMBERS, MemberSpec, build_network
from training.train import CHECKPOINT, export


def inflate(source: MemberSpec, weights: Mapping[str, Tensor], target: MemberSpec) -> torch.nn.Module:
    """Return the target's network with the source's weights.

    Args:
        source: whose network has as many stages, features and convolutions as the target's.
        weights: its state dict.
        target: whose kernels may have one more axis. What it sees of an image counts as the source's slices of that image together; an
            image that the source did not see counts nothing.

    Raises:
        ValueError: the two networks are not alike otherwise.
    """
    network = build_network(target)
    own = network.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(f"the networks of {source.name} and {target.name} have other layers")
    first = next(name for name, value in own.items() if value.ndim > 1)
    started = {}
    for name, value in own.items():
        given = weights[name].float()
        if value.data_ptr() == own[first].data_ptr():
            given = _by_image(given, source, target)
        started[name] = _in_middle(given, value)
    network.load_state_dict(started)
    return network


def _by_image(kernels: Tensor, source: MemberSpec, target: MemberSpec) -> Tensor:
    """Return the first layer's kernels (features, target channels, ...) of those for the source's channels."""
    images = [parse_channel(channel).modality for channel in source.channels]
    return torch.stack(
        [
            kernels[:, [image is parse_channel(channel).modality for image in images]].sum(1)
            for channel in target.channels
        ],
        dim=1,
    )


def _in_middle(given: Tensor, value: Tensor) -> Tensor:
    """Return weights of the shape of `value`: those given, or, along an axis z that they lack, in its middle (of two slices in both)."""
    if given.shape == value.shape:
        return given
    if given.shape != (*value.shape[:2], *value.shape[3:]):
        raise ValueError(f"weights of shape {tuple(given.shape)} can't become {tuple(value.shape)}")
    made = torch.zeros_like(value)
    depth = value.shape[2]
    made[:, :, (depth - 1) // 2 : depth // 2 + 1] = given[:, :, None]
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.inflate",
        description="Start a member from the weights of one with fewer axes or images.",
    )
    parser.add_argument("source", choices=sorted(MEMBERS), help="member to begin with")
    parser.add_argument("member", choices=sorted(MEMBERS), help="member to start")
    parser.add_argument(
        "--weights", type=Path, default=SHIPPED_WEIGHTS, help="folder that holds the source's model folder"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the model folder to write, for training.train --start-from"
    )
    options = parser.parse_args(arguments)
    weights = read_checkpoint(options.weights / options.source / CHECKPOINT)["network_weights"]
    try:
        network = inflate(MEMBERS[options.source], weights, MEMBERS[options.member])
    except ValueError as error:
        parser.error(str(error))
    export(MEMBERS[options.member], network, options.out)


if __name__ == "__main__":
    main()
