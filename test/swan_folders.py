"""Small folders of SWAN's networks with fixed seeds, in files as PyTorch Lightning writes them: a trainer's classes beside the weights."""

from __future__ import annotations

import enum
import functools
import sys
import types
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.families.swan.folder import CHECKPOINTS, FOLDS, NETWORKS
from ensemble.families.swan.network import ARCHITECTURES, UNet

#: Where DeepISLES' archive has the folder, below its `weights/`, and what it calls each file there.
PUBLISHED = Path("FACTORIZER/logs/isles2022_dwi-adc-flair")
FILE = "epoch=1999-step=99999.ckpt"
WIDTHS = (8, 8, 8, 8, 8)


def build_swan_folder(
    folder: Path,
    folds: Sequence[str] = FOLDS,
    kinds: Sequence[str] = NETWORKS,
    widths: Sequence[int] = WIDTHS,
    **changes: Any,
) -> Path:
    """Write a folder and return it. `changes` replace parts of the checkpoints."""
    for fold in folds:
        for kind in kinds:
            write_checkpoint(checkpoint_path(folder, fold, kind), swan_checkpoint(kind, int(fold), widths) | changes)
    return folder


def checkpoint_path(folder: Path, fold: str, kind: str) -> Path:
    """Where the checkpoint of a fold's network is."""
    return (folder / f"fold{fold}" / kind).joinpath(*CHECKPOINTS, FILE)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save it, with hyper-parameters of classes that nobody can import afterwards unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with trainer_module() as trainer:
        objects = {
            "hyper_parameters": hyper_parameters(trainer),
            "callbacks": {trainer.ModelCheckpoint: {"best": [1.0]}},
        }
        torch.save(objects | dict(content), path)


def swan_checkpoint(kind: str, seed: int = 0, widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
    """What Lightning saves of a network, without the objects."""
    weights = filled(ARCHITECTURES[kind](widths, 3), f"{seed}/").state_dict()
    state = OrderedDict((f"net.{name}", tensor) for name, tensor in weights.items())
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5)}}
    return {
        "epoch": 1999,
        "global_step": 99999,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 5, "_last_lr": [1e-4]}],
        "hparams_name": "kwargs",
    }


@contextmanager
def trainer_module() -> Iterator[Any]:
    """A module that can be imported while it is entered."""
    module: Any = types.ModuleType("made_up_trainer")

    class Base:
        """What its classes share: attributes, as any object has them."""

        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)

    class Reduction(enum.Enum):
        MEAN = "mean"

    class Settings(dict[str, Any]):
        pass

    class Records(list[Any]):
        pass

    for name in ("Block", "Loss", "Metric", "Scheduler", "ModelCheckpoint"):
        setattr(module, name, type(name, (Base,), {"__module__": module.__name__, "__qualname__": name}))
    for kind in (Reduction, Settings, Records):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]


def hyper_parameters(trainer: Any) -> dict[str, Any]:
    """As those of the published networks: a partial of a class, modules, metrics, an optimizer's class, an enumeration, a set."""
    return {
        "network": functools.partial(trainer.Block, in_channels=3, stem=(torch.nn.Conv3d, {"bias": False})),
        "loss": torch.nn.CrossEntropyLoss(),
        "metrics": {"dice": trainer.Metric(reduction=trainer.Reduction.MEAN, kept={"a", "b"})},
        "optimizer": (torch.optim.AdamW, {"lr": 1e-4}),
        "settings": trainer.Settings(a=1),
        "records": trainer.Records([1, 2]),
        "numbers": np.float64(3.5),
    }


def filled(network: UNet, prefix: str) -> UNet:
    """Random weights that keep activations near 1; generators are seeded by the prefix and the weight's name."""
    weights = {}
    for name, tensor in network.state_dict().items():
        generator = np.random.default_rng(zlib.crc32(f"{prefix}{name}".encode()))
        shape = tuple(tensor.shape)
        values = generator.standard_normal(shape)
        if name.endswith(("u0", "v0")):
            values = generator.random(shape)
        elif len(shape) == 1:
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        elif not name.endswith("pos"):
            values = values / np.sqrt(shape[0] if "upsample" in name else np.prod(shape[1:]))
        weights[name] = torch.from_numpy(values.astype(np.float32))
    network.load_state_dict(weights, assign=True)
    return network.eval()
