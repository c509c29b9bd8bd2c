"""Small nnU-Net v2 trained-model folders with fixed seeds, and small cases to run them on.

Random weights give masks that are noise, on which no comparison means anything. `build_folder` therefore smooths the random kernels
and scales the last layer so that a set fraction of a sample image comes out as foreground, with smooth borders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from ensemble.geometry import Grid
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality
from ensemble.volume import Volume

FOREGROUND_FRACTION = 0.12
SPLINE_DATA = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
SPLINE_LOGITS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class FolderSpec:
    """What a folder should be like; the defaults make a small 3d_fullres PlainConvUNet for DWI and ADC at 2 mm."""

    configuration: str = "3d_fullres"
    network: str = "PlainConvUNet"
    patch: tuple[int, ...] = (16, 24, 24)
    spacing_mm: tuple[float, ...] = (2.0, 2.0, 2.0)
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1), (2, 2, 2))
    channels: tuple[str, ...] = ("DWI", "ADC")
    labels: Mapping[str, Any] = field(default_factory=lambda: {"background": 0, "lesion": 1})
    schemes: tuple[str, ...] = ("ZScoreNormalization", "ZScoreNormalization")
    use_mask: tuple[bool, ...] = (True, True)
    transpose_forward: tuple[int, int, int] = (0, 1, 2)
    resampling_data: tuple[str, Mapping[str, Any]] = ("resample_data_or_seg_to_shape", SPLINE_DATA)
    resampling_logits: tuple[str, Mapping[str, Any]] = ("resample_data_or_seg_to_shape", SPLINE_LOGITS)
    reader: str = "SimpleITKIO"
    folds: tuple[str, ...] = ("0",)
    mirror_axes: tuple[int, ...] | None = (0, 1, 2)
    old_format: bool = False
    inherited: bool = False
    trainer: str = "nnUNetTrainer"
    norm: str = "instancenorm.InstanceNorm"
    weights_dtype: torch.dtype = torch.float32
    prefix: str = ""
    features: int = 6


def build_folder(root: Path, spec: FolderSpec = FolderSpec(), seed: int = 0) -> Path:
    """Write the folder `<trainer>__nnUNetPlans__<configuration>` below `root` and return it."""
    folder = root / f"{spec.trainer}__nnUNetPlans__{spec.configuration}"
    plans, dataset = plans_json(spec), dataset_json(spec)
    for fold in spec.folds:
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(checkpoint(spec, plans, dataset, seed, fold), folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


def plans_json(spec: FolderSpec) -> dict[str, Any]:
    """`plans.json` as the planner writes it (keys that only training reads are left out)."""
    own = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(spec.patch),
        "spacing": list(spec.spacing_mm),
        "normalization_schemes": list(spec.schemes),
        "use_mask_for_norm": list(spec.use_mask),
        "batch_dice": False,
    }
    for key, (name, kwargs) in (
        ("resampling_fn_data", spec.resampling_data),
        ("resampling_fn_seg", ("resample_data_or_seg_to_shape", {**SPLINE_DATA, "is_seg": True, "order": 1})),
        ("resampling_fn_probabilities", spec.resampling_logits),
    ):
        own |= {key: name, f"{key}_kwargs": dict(kwargs)}
    own |= _old_architecture(spec) if spec.old_format else {"architecture": _architecture(spec)}
    configurations: dict[str, Any] = {spec.configuration: own}
    if spec.inherited:
        changed = {"inherits_from": "base", "patch_size": own["patch_size"]}
        configurations = {"base": {**own, "patch_size": [8] * len(spec.patch)}, spec.configuration: changed}
    statistics = {"mean": 1.0, "std": 0.7, "percentile_00_5": 0.1, "percentile_99_5": 2.2, "median": 1.0}
    return {
        "dataset_name": "Dataset900_Small",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": spec.reader,
        "transpose_forward": list(spec.transpose_forward),
        "transpose_backward": [int(axis) for axis in np.argsort(spec.transpose_forward)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): statistics for i in range(len(spec.channels))},
    }


def dataset_json(spec: FolderSpec) -> dict[str, Any]:
    """`dataset.json` as a user writes it."""
    return {
        "channel_names": {str(index): name for index, name in enumerate(spec.channels)},
        "labels": dict(spec.labels),
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


def checkpoint(
    spec: FolderSpec, plans: dict[str, Any], dataset: dict[str, Any], seed: int = 0, fold: str = "0"
) -> dict[str, Any]:
    """A checkpoint with everything that nnU-Net's trainer saves, numpy scalars in its log included."""
    network = crafted_network(spec, seed, fold)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, nesterov=True)
    return {
        "network_weights": {
            spec.prefix + name: tensor.to(spec.weights_dtype) for name, tensor in network.state_dict().items()
        },
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {
            "mean_fg_dice": [np.float64(0.5), np.float32(0.6)],
            "dice_per_class_or_region": [[np.float64(0.5)]],
            "train_losses": [np.float32(-0.1)],
            "lrs": [0.01],
            "epoch_start_timestamps": [1.7e9],
        },
        "_best_ema": np.float64(0.55),
        "current_epoch": 1000,
        "init_args": {
            "plans": plans,
            "configuration": spec.configuration,
            "fold": 0,
            "dataset_json": dataset,
            "device": torch.device("cuda"),
        },
        "trainer_name": spec.trainer,
        "inference_allowed_mirroring_axes": spec.mirror_axes,
    }


def crafted_network(spec: FolderSpec, seed: int = 0, fold: str = "0") -> torch.nn.Module:
    """A network with smooth random kernels, balanced on a sample image as the module's docstring says.

    Folds are variations of one network, as after training on nearly the same cases.
    """
    torch.manual_seed(seed)
    block = _architecture(spec)
    kwargs = block["arch_kwargs"] | {key: locate(block["arch_kwargs"][key]) for key in ("conv_op", "norm_op", "nonlin")}
    architecture: Any = locate(block["network_class_name"])
    network: Any = architecture(
        input_channels=len(spec.channels), num_classes=_classes(spec), deep_supervision=False, **kwargs
    ).eval()
    torch.manual_seed(int(fold) if fold.isdecimal() else 99)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
            if parameter.ndim > 3 and max(parameter.shape[2:]) == 3:
                parameter.copy_(torch.from_numpy(_smooth(parameter.numpy())))
        last = network.decoder.seg_layers[-1]
        last.weight[0] = -last.weight[1:].mean(0)
        last.bias.zero_()
        sample = torch.from_numpy(_sample(len(spec.channels), (24, 40, 40)))
        logits = network(sample if len(spec.patch) == 3 else sample[:, :, 12])[0]
        margin = (logits[1:].amax(0) - logits[0]).numpy()
        scale = 6 / float(margin.std())
        last.weight.mul_(scale)
        last.bias[1:] = -scale * float(np.quantile(margin, 1 - FOREGROUND_FRACTION))
    return network


def small_case(
    shape: tuple[int, int, int] = (22, 40, 36),
    spacing_zyx_mm: tuple[float, float, float] = (2.0, 2.0, 2.0),
    *,
    direction: tuple[float, ...] = IDENTITY,
    seed: int = 0,
) -> PreparedCase:
    """A case with smooth DWI, ADC and FLAIR in an ellipsoid, 0 outside."""
    z, y, x = shape
    grid = Grid((x, y, z), spacing_zyx_mm[::-1], (3.0, -7.0, 11.0), direction)
    images = _images(3, shape, seed)
    volumes = {modality: Volume(image, grid) for modality, image in zip(Modality, images, strict=True)}
    brain = Volume(images[0] > 0, grid)
    return PreparedCase(
        name="small", images=volumes, as_read=volumes, tissue_normalized=volumes, brain=brain, repairs=()
    )


def _images(count: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """(count, z, y, x) float32: mean about 1, smooth, zero outside an ellipsoid."""
    generator = np.random.default_rng(seed)
    axes = [np.linspace(-1.05, 1.05, n) for n in shape]
    inside = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) < 1
    sigma = [n / 12 for n in shape]
    noise = np.stack([gaussian_filter(generator.normal(size=shape), sigma) for _ in range(count)])
    images = 1 + 0.3 * noise / noise.std()
    return np.where(inside, np.maximum(images, 0.05), 0).astype(np.float32)


def _sample(channels: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(1, channels, z, y, x) normalised image that networks are balanced on."""
    images = _images(channels, shape, seed=0)
    inside = images > 0
    return (np.where(inside, images - images[inside].mean(), 0) / images[inside].std())[None].astype(np.float32)


def _smooth(kernels: np.ndarray) -> np.ndarray:
    """Random kernels with their high spatial frequencies taken away."""
    spatial = tuple(0.8 if axis > 1 else 0.0 for axis in range(kernels.ndim))
    return gaussian_filter(kernels, spatial, mode="nearest")


def _classes(spec: FolderSpec) -> int:
    return len({str(value) for name, value in spec.labels.items() if name != "ignore"})


def _blocks_key(spec: FolderSpec) -> str:
    return "n_conv_per_stage" if spec.network == "PlainConvUNet" else "n_blocks_per_stage"


def _kernels(spec: FolderSpec) -> list[list[int]]:
    """1 along an axis that is not pooled and is short, else 3: as the planner does for thick slices."""
    thick = [
        max(spec.spacing_mm) / mm <= 1 and max(spec.spacing_mm) / min(spec.spacing_mm) > 2 for mm in spec.spacing_mm
    ]
    return [[1 if flat and stage == 0 else 3 for flat in thick] for stage in range(len(spec.strides))]


def _architecture(spec: FolderSpec) -> dict[str, Any]:
    dims, stages = len(spec.patch), len(spec.strides)
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{spec.network}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(spec.features * 2**stage, 24) for stage in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": _kernels(spec),
            "strides": [list(stride) for stride in spec.strides],
            _blocks_key(spec): [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.{spec.norm}{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _old_architecture(spec: FolderSpec) -> dict[str, Any]:
    stages = len(spec.strides)
    return {
        "UNet_class_name": spec.network,
        "UNet_base_num_features": spec.features,
        "unet_max_num_features": 24,
        "n_conv_per_stage_encoder": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "num_pool_per_axis": [stages - 1] * len(spec.patch),
        "pool_op_kernel_sizes": [list(stride) for stride in spec.strides],
        "conv_kernel_sizes": _kernels(spec),
    }
