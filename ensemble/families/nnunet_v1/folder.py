"""The files of an nnU-Net v1 trained-model folder: `fold_*/model_final_checkpoint.model`, `.model.pkl` beside each, `plans.pkl`.

A packed folder has `fold_*/model_final_checkpoint.safetensors` and `plans.json` in their place. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.errors import WeightsBroken
from ensemble.families.folds import ALL_FOLDS_V1, nnunet_fold_folders
from ensemble.families.nnunet_v1.plans import NnunetV1Plans, parse_plans, plans_from_json
from ensemble.files import read_json
from ensemble.weights.folder import describe_weights_folder
from ensemble.weights.pickles import read_pickle

WEIGHTS, PACKED_WEIGHTS = "model_final_checkpoint.model", "model_final_checkpoint.safetensors"
PLANS, PACKED_PLANS = "plans.pkl", "plans.json"
_REMEDY = (
    "give the complete folder: plans.pkl, fold_*/model_final_checkpoint.model and model_final_checkpoint.model.pkl"
)


@dataclass(frozen=True)
class NnunetV1Folder:
    """A model's plans and the weight files of its folds."""

    plans: NnunetV1Plans
    weights: Mapping[str, Path]
    """For each fold ("0", "1", ... or "all"), its weights."""


def read_nnunet_v1_folder(folder: Path) -> NnunetV1Folder:
    """Read everything in a model folder except the weights.

    Raises WeightsBroken, naming file and finding, if anything is missing, damaged, contradictory or not supported.
    """
    weights = {name: _weights_of(path) for name, path in nnunet_fold_folders(folder, ALL_FOLDS_V1).items()}
    if not weights:
        raise WeightsBroken(
            f"the model folder has no fold_*/{WEIGHTS}", where=folder, found=describe_weights_folder(folder), do=_REMEDY
        )
    if (packed := folder / PACKED_PLANS).is_file():
        plans = _parsed(packed, lambda: plans_from_json(read_json(packed)))
        return NnunetV1Folder(plans, weights)
    descriptions = {name: path.with_name(f"{path.name}.pkl") for name, path in weights.items()}
    by_fold = {name: _described(path) for name, path in descriptions.items()}
    (first, plans), *others = by_fold.items()
    for name, other in others:
        if other != plans:
            raise WeightsBroken(
                f"folds {first} and {name} of the model folder were trained with different plans",
                where=descriptions[name],
                found=_difference(plans, other),
                do="keep one model per folder",
            )
    _check_plans_file(folder / PLANS, plans)
    return NnunetV1Folder(plans, weights)


def _weights_of(fold: Path) -> Path:
    for name in (WEIGHTS, PACKED_WEIGHTS):
        if (fold / name).is_file():
            return fold / name
    raise WeightsBroken(
        f"a fold has no {WEIGHTS}",
        where=fold,
        found=describe_weights_folder(fold),
        do=f"{_REMEDY}; or remove the folder of this fold",
    )


def _described(path: Path) -> NnunetV1Plans:
    description = read_pickle(path)
    return _parsed(path, lambda: parse_plans(description))


def _parsed(path: Path, parse: Callable[[], NnunetV1Plans]) -> NnunetV1Plans:
    try:
        return parse()
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise WeightsBroken(
            f"{path.name} does not describe a supported model",
            where=path,
            found=f"missing or unknown: {error}" if isinstance(error, KeyError) else str(error),
            do="use the file that nnU-Net v1 wrote with these weights, for a 3d_fullres model",
        ) from error


def _check_plans_file(path: Path, plans: NnunetV1Plans) -> None:
    """Check that `plans.pkl` has the same modalities; nnU-Net uses nothing else in it for a prediction."""
    content: Any = read_pickle(path)
    channels = content.get("num_modalities") if isinstance(content, dict) else None
    if channels != len(plans.modalities):
        raise WeightsBroken(
            "plans.pkl and the plans of the folds belong to different models",
            where=path,
            found=f"num_modalities {channels}; the folds have {len(plans.modalities)}",
            do="keep the files of one training together",
        )


def _difference(one: NnunetV1Plans, other: NnunetV1Plans) -> str:
    mine, theirs = one.as_json(), other.as_json()
    return "; ".join(f"{key} {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key])
