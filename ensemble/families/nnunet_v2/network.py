"""Build the U-Net that nnU-Net v2 plans name, from an allow-list of classes: plans are data and may import nothing else."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD

from ensemble.families.nnunet_v2.plans import Architecture

_NETWORKS = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}
#: What arguments may name, by the last part of the dotted path (modules have moved between releases).
_PARTS: dict[str, Any] = {
    part.__name__: part
    for part in (
        torch.nn.Conv2d,
        torch.nn.Conv3d,
        torch.nn.InstanceNorm2d,
        torch.nn.InstanceNorm3d,
        torch.nn.BatchNorm2d,
        torch.nn.BatchNorm3d,
        torch.nn.Dropout2d,
        torch.nn.Dropout3d,
        torch.nn.LeakyReLU,
        torch.nn.ReLU,
        torch.nn.GELU,
        torch.nn.SiLU,
        BasicBlockD,
        BottleneckD,
    )
}
_MAX_STAGES, _MAX_FEATURES = 16, 4096


def build_nnunet_v2_network(
    architecture: Architecture, channels: int, classes: int, trainer: str = ""
) -> torch.nn.Module:
    """Build the network without memory for its weights (on the meta device); `checkpoints.load_weights` fills them in.

    `trainer` is the checkpoint's: nnUNetTrainerBN replaces the plans' normalisation by batch normalisation.
    Raises ValueError for classes that are not on the allow-list and for arguments that make no network.
    """
    name = architecture.class_name.rpartition(".")[2]
    if name not in _NETWORKS:
        raise ValueError(f"network {architecture.class_name!r} is not one of {', '.join(_NETWORKS)}")
    kwargs = dict(architecture.kwargs)
    for argument in architecture.imported:
        kwargs[argument] = _part(kwargs.get(argument))
    if trainer == "nnUNetTrainerBN":
        kwargs |= {"norm_op": _batch_norm(kwargs.get("conv_op")), "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    _check_size(kwargs)
    if unknown := sorted(set(kwargs) - set(signature(_NETWORKS[name]).parameters)):
        raise ValueError(f"{name} has no arguments {', '.join(unknown)}")
    try:
        with torch.device("meta"):
            network: torch.nn.Module = _NETWORKS[name](
                input_channels=channels, num_classes=classes, **(kwargs | {"deep_supervision": False})
            )
    except (TypeError, AssertionError, IndexError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"the arguments of {name} do not describe a network: {error}") from error
    return network


def _part(dotted: Any) -> Any:
    if dotted is None:
        return None
    name = str(dotted).rpartition(".")[2]
    if name not in _PARTS:
        raise ValueError(f"{dotted!r} is not one of {', '.join(_PARTS)}")
    return _PARTS[name]


def _batch_norm(conv: Any) -> Any:
    return torch.nn.BatchNorm2d if conv is torch.nn.Conv2d else torch.nn.BatchNorm3d


def _check_size(kwargs: dict[str, Any]) -> None:
    """Refuse numbers that no planner writes, before they exhaust memory or time."""
    stages = kwargs.get("n_stages", 0)
    features = kwargs.get("features_per_stage", 0)
    largest = max(features, default=0) if isinstance(features, list) else features
    if not (isinstance(stages, int) and 0 < stages <= _MAX_STAGES):
        raise ValueError(f"n_stages {stages!r} is not within 1 to {_MAX_STAGES}")
    if not (isinstance(largest, int) and 0 < largest <= _MAX_FEATURES):
        raise ValueError(f"features_per_stage {features!r} is not within 1 to {_MAX_FEATURES}")
