"""The shipped members: their input images and networks, as nnU-Net v2's `plans.json` and `dataset.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from ensemble.families.channels import parse_channel
from ensemble.families.nnunet_v2.family import MEMBER_METADATA_KEY

RESAMPLE = "resample_data_or_seg_to_shape"
NEIGHBOURS = (0, -1, 1, -2, 2)  # input slices of the 2.5-D member, its own first


@dataclass(frozen=True)
class MemberSpec:
    """One member: its input, its network, its training batches."""

    name: str
    configuration: str  # nnU-Net's: "3d_fullres" or "2d"
    channels: tuple[str, ...]  # "DWI", "DWI[-1]" for the slice below, "FLAIR?" for what may be missing
    spacing_mm: tuple[float, ...]  # (z, y, x), or (y, x) for 2-D
    patch: tuple[int, ...]  # window at inference
    training_patch: tuple[int, ...]
    batch: int  # volumes, or slices, in a training step
    features: tuple[int, ...]
    convolutions: tuple[int, ...]  # in each encoder stage
    decoder_convolutions: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...] = ()  # of each stage; by default 3 along each axis
    strides: tuple[tuple[int, ...], ...] = ()  # into each stage; by default 2 along each axis, but for the first

    @property
    def dimensions(self) -> int:
        return len(self.spacing_mm)

    @property
    def images(self) -> int:
        """Number of its input images among DWI, ADC and FLAIR, in this order."""
        return len({parse_channel(channel).modality for channel in self.channels})


ISO3D = MemberSpec(
    name="iso3d",
    configuration="3d_fullres",
    channels=("DWI", "ADC"),
    spacing_mm=(2.0, 2.0, 2.0),
    patch=(80, 96, 80),
    training_patch=(24, 96, 80),
    batch=3,
    features=(32, 64, 96, 128, 128),
    convolutions=(2, 2, 2, 2, 2),
    decoder_convolutions=(2, 2, 2, 1),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
)
MEMBERS = {
    "iso3d": ISO3D,
    "slice2d": MemberSpec(
        name="slice2d",
        configuration="2d",
        channels=tuple(f"{m}[{o:+d}]" if o else m for o in NEIGHBOURS for m in ("DWI", "ADC")),
        spacing_mm=(2.0, 2.0),
        patch=(96, 80),
        training_patch=(96, 80),
        batch=24,
        features=(32, 64, 96, 128, 128),
        convolutions=(2, 2, 2, 2, 2),
        decoder_convolutions=(2, 2, 2, 1),
    ),
    "flair3d": replace(ISO3D, name="flair3d", channels=("DWI", "ADC", "FLAIR?")),
}


def dataset_json(spec: MemberSpec) -> dict[str, Any]:
    """nnU-Net's description of input and output."""
    return {
        "channel_names": {str(i): name for i, name in enumerate(spec.channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 0,
        "file_ending": ".nii.gz",
        "description": "simulated patients (training/simulate.py)",
        MEMBER_METADATA_KEY: {"intensities": "tissue_normalized", "orientation": "canonical"},
    }


def plans_json(spec: MemberSpec) -> dict[str, Any]:
    """nnU-Net's plans. The images arrive tissue-normalised, hence NoNormalization; hence also BatchNorm, since
    InstanceNorm would throw the absolute intensities away again.
    """
    return {
        "dataset_name": f"Dataset001_{spec.name}",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 2.0, 2.0],
        "original_median_shape_after_transp": [68, 88, 70],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        # nnU-Net looks each channel up, although NoNormalization reads nothing there
        "foreground_intensity_properties_per_channel": {str(i): {} for i in range(len(spec.channels))},
        "configurations": {spec.configuration: _configuration(spec)},
    }


def _configuration(spec: MemberSpec) -> dict[str, Any]:
    channels = len(spec.channels)
    return {
        "data_identifier": f"nnUNetPlans_{spec.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": spec.batch,
        "patch_size": list(spec.patch),
        "median_image_size_in_voxels": [68.0, 88.0, 70.0][3 - spec.dimensions :],
        "spacing": list(spec.spacing_mm),
        "normalization_schemes": ["NoNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": RESAMPLE,
        "resampling_fn_seg": RESAMPLE,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": RESAMPLE,
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "batch_dice": False,
        "architecture": _architecture(spec),
    }


def _architecture(spec: MemberSpec) -> dict[str, Any]:
    dims, stages = spec.dimensions, len(spec.features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(spec.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [list(kernel) for kernel in spec.kernels] or [[3] * dims] * stages,
            "strides": [list(stride) for stride in spec.strides] or [[1] * dims] + [[2] * dims] * (stages - 1),
            "n_conv_per_stage": list(spec.convolutions),
            "n_conv_per_stage_decoder": list(spec.decoder_convolutions),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.batchnorm.BatchNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def build_network(spec: MemberSpec) -> torch.nn.Module:
    """The network as nnU-Net builds it from the plans, randomly initialised, without deep supervision."""
    architecture = _architecture(spec)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        len(spec.channels),
        2,
        allow_init=True,
        deep_supervision=False,
    )
