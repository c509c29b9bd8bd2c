"""The plans of an nnU-Net v1 model, read from `model_final_checkpoint.model.pkl` into a frozen dataclass.

Format: nnU-Net 1.6 to 1.7 (`experiment_planner_baseline_3DUNet_v21.py`, `nnUNetTrainer.process_plans`, `model_restore.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, prod
from typing import Any

from ensemble.families.unet import window_bytes
from ensemble.geometry import Triple
from ensemble.resample import NnunetResampling

Sizes = tuple[int, int, int]

#: Parts of the names of trainers whose network, mirroring or export differs from nnUNetTrainerV2's.
OTHER_TRAINERS = re.compile(
    r"BN|FRN|GN|GeLU|ReLU|Mish|NoNormalization|Resenc|Regions|Cascade|noMirroring|noDA|resample33", re.IGNORECASE
)
#: Most feature maps of a stage in nnU-Net.
MAX_FEATURES = 320
_MAX_POOLINGS, _MAX_CONVOLUTIONS, _MAX_WINDOW = 10, 8, 1024
_NO_NORMALISATION, _TRAINED_FOR_CT = "noNorm", ("CT", "CT2")


@dataclass(frozen=True)
class NnunetV1Plans:
    """The 3-D network of one nnU-Net v1 model, and its preprocessing."""

    trainer: str
    """Name of the trainer class."""
    modalities: tuple[str, ...]
    """For each input channel, what the training data called it."""
    patch: Sizes
    """Window of the network, in its axis order."""
    spacing_mm: Triple
    """Voxel spacing that the network works at, in its axis order."""
    transpose_forward: Sizes
    """The (z, y, x) axis that becomes the network's first, second, third one."""
    base_features: int
    """Feature maps of the first stage; each stage doubles them, up to MAX_FEATURES."""
    convolutions: int
    """Convolutions of each stage."""
    pools: tuple[Sizes, ...]
    """Strides from each stage to the next."""
    kernels: tuple[Sizes, ...]
    """Kernels of each stage, the bottleneck last."""
    normalise: tuple[bool, ...]
    """For each input channel, whether it is brought to zero mean and unit deviation."""
    use_mask: tuple[bool, ...]
    """For each input channel, whether only the non-zero region is normalised, and the rest set to 0."""
    resample_softmax: NnunetResampling
    """How probabilities are brought back to the image's spacing."""

    @property
    def smallest_window(self) -> Sizes:
        """A small window that all poolings divide, with more than one voxel left at the bottleneck."""
        z, y, x = (2 * prod(pool[axis] for pool in self.pools) for axis in range(3))
        return z, y, x

    @property
    def window_bytes(self) -> int:
        """Memory that the activations of one window take."""
        return window_bytes(self.patch, self.base_features)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as `plans_from_json` reads them."""
        return asdict(self)


def parse_plans(description: Mapping[str, Any]) -> NnunetV1Plans:
    """Parse the plain values of a `.model.pkl` (keys init, name, plans).

    Raises ValueError, KeyError, TypeError or IndexError for what is missing, contradictory or not supported.
    """
    plans, trainer = description["plans"], str(description["name"])
    if OTHER_TRAINERS.search(trainer):
        raise ValueError(f"trainer {trainer} is not supported, because its network is not that of nnUNetTrainerV2")
    if (classes := int(plans["num_classes"])) != 1:
        raise ValueError(f"num_classes is {classes}; one class besides the background is expected")
    stage = _stage(plans["plans_per_stage"], description["init"])
    channels = int(plans["num_modalities"])
    pools = _pools(stage)
    read = NnunetV1Plans(
        trainer=trainer,
        modalities=tuple(str(name) for name in _per_channel(plans["modalities"], channels)),
        patch=_sizes(stage["patch_size"], _MAX_WINDOW),
        spacing_mm=_spacing(stage["current_spacing"]),
        transpose_forward=_permutation(plans.get("transpose_forward") or (0, 1, 2)),
        base_features=int(plans["base_num_features"]),
        convolutions=int(plans.get("conv_per_stage", 2)),
        pools=pools,
        kernels=_kernels(stage, len(pools)),
        normalise=tuple(_normalised(name) for name in _per_channel(plans["normalization_schemes"], channels)),
        use_mask=tuple(bool(mask) for mask in _per_channel(plans["use_mask_for_norm"], channels)),
        resample_softmax=_export(plans.get("segmentation_export_params")),
    )
    check_plans(read)
    return read


def plans_from_json(content: Mapping[str, Any]) -> NnunetV1Plans:
    """Read what `NnunetV1Plans.as_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    read = NnunetV1Plans(
        trainer=str(content["trainer"]),
        modalities=tuple(str(name) for name in content["modalities"]),
        patch=_sizes(content["patch"], _MAX_WINDOW),
        spacing_mm=_spacing(content["spacing_mm"]),
        transpose_forward=_permutation(content["transpose_forward"]),
        base_features=int(content["base_features"]),
        convolutions=int(content["convolutions"]),
        pools=tuple(_sizes(pool) for pool in content["pools"]),
        kernels=tuple(_sizes(kernel) for kernel in content["kernels"]),
        normalise=tuple(bool(yes) for yes in content["normalise"]),
        use_mask=tuple(bool(yes) for yes in content["use_mask"]),
        resample_softmax=NnunetResampling(**content["resample_softmax"]),
    )
    check_plans(read)
    return read


def check_plans(plans: NnunetV1Plans) -> None:
    """Raise ValueError for numbers that no planner writes, before a huge network is built from them."""
    channels = len(plans.modalities)
    if not channels or len(plans.normalise) != channels or len(plans.use_mask) != channels:
        raise ValueError(f"{channels} modalities, {len(plans.normalise)} schemes, {len(plans.use_mask)} masks")
    if not 0 < plans.base_features <= MAX_FEATURES:
        raise ValueError(f"base_num_features {plans.base_features} is not within 1 to {MAX_FEATURES}")
    if not 2 <= plans.convolutions <= _MAX_CONVOLUTIONS:
        raise ValueError(f"conv_per_stage {plans.convolutions} is not within 2 to {_MAX_CONVOLUTIONS}")
    if not 0 < len(plans.pools) <= _MAX_POOLINGS or len(plans.kernels) != len(plans.pools) + 1:
        raise ValueError(f"{len(plans.pools)} poolings, {len(plans.kernels)} kernels")
    if even := [kernel for kernel in plans.kernels if not set(kernel) <= {1, 3}]:
        raise ValueError(f"kernel {even[0]}; nnU-Net pads only kernels of 1 and 3")
    shrink = [1, 1, 1]
    for pool in plans.pools:
        shrink = [total * stride for total, stride in zip(shrink, pool, strict=True)]
    if any(length % total for length, total in zip(plans.patch, shrink, strict=True)):
        raise ValueError(f"patch {plans.patch} is not divisible by the poolings' product {tuple(shrink)}")


def _stage(stages: Mapping[Any, Any], init: Sequence[Any]) -> Mapping[str, Any]:
    """Return the stage of a cascade that was trained: the trainer's sixth argument, or the only stage.

    nnUNetTrainerV2_DDP has one argument more before it: third comes the process's rank, where others have the output folder.
    """
    place = 6 if len(init) > 2 and isinstance(init[2], int) else 5
    chosen = init[place] if len(init) > place else None
    if chosen is None:
        if len(stages) != 1:
            raise ValueError(
                f"plans have {len(stages)} stages, and the checkpoint does not say which one it belongs to"
            )
        chosen = next(iter(stages))
    stage: Mapping[str, Any] = stages[chosen]
    return stage


def _pools(stage: Mapping[str, Any]) -> tuple[Sizes, ...]:
    """Return the pooling of each stage. Early plans give only a count per axis; an axis with fewer poolings starts later."""
    if "pool_op_kernel_sizes" in stage:
        return tuple(_sizes(pool) for pool in stage["pool_op_kernel_sizes"])
    counts = [int(count) for count in stage["num_pool_per_axis"]]
    deepest = max(counts)
    return tuple(_sizes([2 if deepest - count <= level else 1 for count in counts]) for level in range(deepest))


def _kernels(stage: Mapping[str, Any], poolings: int) -> tuple[Sizes, ...]:
    if "conv_kernel_sizes" not in stage:
        return ((3, 3, 3),) * (poolings + 1)
    return tuple(_sizes(kernel) for kernel in stage["conv_kernel_sizes"])


def _export(parameters: Mapping[str, Any] | None) -> NnunetResampling:
    """Return how softmax is resampled: linear, nearest along a coarse axis, unless the plans say otherwise."""
    if parameters is None:
        return NnunetResampling(order=1)
    separate = parameters["force_separate_z"]
    return NnunetResampling(
        order=int(parameters["interpolation_order"]),
        order_z=int(parameters["interpolation_order_z"]),
        force_separate_z=None if separate is None else bool(separate),
    )


def _per_channel(table: Mapping[Any, Any], channels: int) -> list[Any]:
    if len(table) != channels:
        raise ValueError(f"{len(table)} entries for {channels} channels")
    return [table[channel] for channel in range(channels)]


def _normalised(scheme: str) -> bool:
    """Return which channels get z-score normalisation: in nnU-Net v1 all but those with these scheme names."""
    if scheme in _TRAINED_FOR_CT:
        raise ValueError(f"normalization scheme {scheme!r} is for CT")
    return scheme != _NO_NORMALISATION


def _sizes(values: Sequence[Any], most: int = 16) -> Sizes:
    sizes = tuple(int(value) for value in values)
    if len(sizes) != 3 or not all(0 < size <= most for size in sizes):
        raise ValueError(f"{sizes}: three sizes of 1 to {most} are expected (only 3-D networks are supported)")
    return sizes[0], sizes[1], sizes[2]


def _spacing(values: Sequence[Any]) -> Triple:
    first, second, third = (float(value) for value in values)
    if not all(0 < mm < inf for mm in (first, second, third)):
        raise ValueError(f"spacing {(first, second, third)}")
    return first, second, third


def _permutation(values: Sequence[Any]) -> Sizes:
    first, second, third = (int(value) for value in values)
    if sorted((first, second, third)) != [0, 1, 2]:
        raise ValueError(f"transpose_forward {(first, second, third)} is not a permutation of 0, 1, 2")
    return first, second, third
