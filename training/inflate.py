"""Initialise a 3-D member from a 2-D one, or one with more images from another: `python -m training.inflate SOURCE MEMBER --out DIR`.

Kernels (y, x) become (z, y, x), with their weights in the middle slice and zeros elsewhere. (Carreira and Zisserman, CVPR 2017, repeat them
along the new axis instead.) For a volume of equal slices the new network has the output of the old one. To train it further:
`python -m training.train MEMBER --start-from DIR --frozen-norm`.
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
        source: a member with as many stages, features and convolutions as the target.
        weights: state dict of the source's network.
        target: its kernels may have one more axis. Its first kernels for an image are the sum of the source's over the slices of that
            image, and zero for an image that the source does not have.

    Raises:
        ValueError: the two networks differ in anything else.
    """
    network = build_network(target)
    own = network.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(f"the networks of {source.name} and {target.name} have different layers")
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
    """Return kernels (features, target channels, ...) of the first layer from those for the source's channels."""
    images = [parse_channel(channel).modality for channel in source.channels]
    return torch.stack(
        [
            kernels[:, [image is parse_channel(channel).modality for image in images]].sum(1)
            for channel in target.channels
        ],
        dim=1,
    )


def _in_middle(given: Tensor, value: Tensor) -> Tensor:
    """Return `given` in the shape of `value`: along a new axis z in the middle slice (of two slices, in both), zeros elsewhere."""
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
        description="Initialise a member with the weights of one that has fewer axes or images.",
    )
    parser.add_argument("source", choices=sorted(MEMBERS), help="member whose weights are used")
    parser.add_argument("member", choices=sorted(MEMBERS), help="member to initialise")
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
