"""Small nnU-Net v1 trained-model folders with fixed seeds, in the files that its trainer writes."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.families.nnunet_v1.network import build_nnunet_v1_network
from ensemble.families.nnunet_v1.plans import parse_plans

#: Where DeepISLES' archive has the folder, below its `weights/`.
PUBLISHED = Path(
    "SEALS/nnUNet_trained_models/nnUNet/3d_fullres/Task012_Ischemic_Stroke_TM_Fullset/nnUNetTrainerV2_DDP__nnUNetPlansv2.1"
)


@dataclass(frozen=True)
class V1Spec:
    """What a folder should be like; the defaults make a tiny model of DWI and ADC at 1 mm."""

    patch: tuple[int, ...] = (16, 16, 24)
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)
    pools: tuple[tuple[int, ...], ...] = ((2, 2, 2), (1, 2, 2))
    kernels: tuple[tuple[int, ...], ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    features: int = 4
    transpose_forward: tuple[int, ...] = (0, 1, 2)
    modalities: Mapping[int, str] = field(default_factory=lambda: {0: "dwi", 1: "adc"})
    schemes: tuple[str, ...] = ("nonCT", "nonCT")
    use_mask: tuple[bool, ...] = (True, True)
    classes: int = 1
    stages: int = 1
    trainer: str = "nnUNetTrainerV2"
    folds: tuple[str, ...] = ("fold_0",)
    prefix: str = "module."
    scaler: bool = True
    zipped: bool = True
    changed_plans: Mapping[str, Any] = field(default_factory=dict)


def build_v1_folder(folder: Path, spec: V1Spec = V1Spec(), seed: int = 0) -> Path:
    """Write a model folder and return it."""
    for number, fold in enumerate(spec.folds):
        (folder / fold).mkdir(parents=True)
        checkpoint = folder / fold / "model_final_checkpoint.model"
        torch.save(v1_checkpoint(spec, seed + number), checkpoint, _use_new_zipfile_serialization=spec.zipped)
        write_pickle(v1_description(spec, number), checkpoint.with_name(f"{checkpoint.name}.pkl"))
    write_pickle(v1_plans(spec), folder / "plans.pkl")
    return folder


def v1_plans(spec: V1Spec) -> dict[str, Any]:
    """`plans.pkl` as the planner writes it, numpy arrays and scalars included."""
    stage = {
        "batch_size": 2,
        "num_pool_per_axis": [sum(pool[axis] == 2 for pool in spec.pools) for axis in range(3)],
        "patch_size": np.array(spec.patch),
        "median_patient_size_in_voxels": np.array([136, 159, 134]),
        "current_spacing": np.array(spec.spacing_mm),
        "original_spacing": np.array([1.0, 1.0, 1.0]),
        "do_dummy_2D_data_aug": np.bool_(False),
        "pool_op_kernel_sizes": [list(pool) for pool in spec.pools],
        "conv_kernel_sizes": [list(kernel) for kernel in spec.kernels],
    }
    plans = {
        "num_stages": spec.stages,
        "num_modalities": len(spec.modalities),
        "modalities": dict(spec.modalities),
        "normalization_schemes": OrderedDict(enumerate(spec.schemes)),
        "dataset_properties": {"all_sizes": [(132, 154, 128)], "size_reductions": {"a": np.float64(0.4)}},
        "original_spacings": [np.array([1.0, 1.0, 1.0])],
        "preprocessor_name": "GenericPreprocessor",
        "num_classes": spec.classes,
        "all_classes": list(range(1, spec.classes + 1)),
        "base_num_features": spec.features,
        "use_mask_for_norm": OrderedDict(enumerate(spec.use_mask)),
        "keep_only_largest_region": None,
        "transpose_forward": [np.int64(axis) for axis in spec.transpose_forward],
        "transpose_backward": [int(axis) for axis in np.argsort(spec.transpose_forward)],
        "data_identifier": "nnUNetData_plans_v2.1",
        # of a cascade, the last stage is the one that was trained
        "plans_per_stage": {n: stage if n == spec.stages - 1 else {} for n in range(spec.stages)},
        "conv_per_stage": 2,
    }
    return plans | dict(spec.changed_plans)


def v1_description(spec: V1Spec, fold: int = 0) -> dict[str, Any]:
    """`.model.pkl`: how the trainer was called, and its plans."""
    init: tuple[Any, ...] = ("results", "data", False, spec.stages - 1, True, False, True)
    if spec.trainer.endswith("_DDP"):
        init = (0, *init, False)
    init = ("plans.pkl", fold, *init)
    return OrderedDict(init=init, name=spec.trainer, plans=v1_plans(spec)) | {"class": f"<class '{spec.trainer}'>"}


def v1_checkpoint(spec: V1Spec, seed: int) -> dict[str, Any]:
    """`.model`: weights, and what else the trainer keeps, numpy scalars in its curves included."""
    network = random_network(spec, seed)
    curve = [np.float64(0.5), np.float32(0.25)]
    content: dict[str, Any] = {
        "epoch": 1000,
        "state_dict": OrderedDict((spec.prefix + name, tensor) for name, tensor in network.state_dict().items()),
        "optimizer_state_dict": torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99).state_dict(),
        "lr_scheduler_state_dict": None,
        "plot_stuff": (curve, curve, [], curve),
        "best_stuff": (None, np.float64(0.5), None),
    }
    if spec.scaler:
        content["amp_grad_scaler"] = {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 1,
        }
    return content


def random_network(spec: V1Spec, seed: int) -> torch.nn.Module:
    """A network whose answers vary from voxel to voxel and lie on both sides of one half."""
    plain = V1Spec(**{**spec.__dict__, "classes": 1, "trainer": "nnUNetTrainerV2", "changed_plans": {}})
    network = build_nnunet_v1_network(parse_plans(v1_description(plain))).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("instnorm.weight")))
    return network


def write_pickle(content: Any, path: Path, protocol: int = 4) -> Path:
    """Write a pickle as nnU-Net does."""
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_numpy1_pickle(content: Any, path: Path) -> Path:
    """Write a pickle with the module names of numpy 1, as files of 2022 have them (in protocol 2 names are plain lines)."""
    path.write_bytes(pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core"))
    return path
