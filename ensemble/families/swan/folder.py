"""The files of SWAN's folder: `fold*/{resunet,swin-factorizer}/version_0/checkpoints/*.ckpt`, as DeepISLES' archive lays them out.

A packed folder has `fold*/{resunet,swin-factorizer}/network.safetensors` in their place. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import WeightsBroken
from ensemble.weights.folder import convert_folder_errors, describe_weights_folder

#: What each fold holds, as its folders are called.
NETWORKS = ("resunet", "swin-factorizer")
#: As many folds were published.
FOLDS = tuple(map(str, range(5)))
SUFFIX, PACKED = ".ckpt", "network.safetensors"
CHECKPOINTS = ("version_0", "checkpoints")
_LAYOUT = "fold*/{resunet,swin-factorizer}/version_0/checkpoints/*.ckpt"


@dataclass(frozen=True)
class SwanFolder:
    """The weight files of a member's networks."""

    weights: Mapping[tuple[str, str], Path]
    """By fold ("0", "1", ...) and kind of network; folds in their order within each kind."""

    @property
    def missing(self) -> str:
        """Which of the published networks are missing, in one clause; empty if none is."""
        gone = [(fold, kind) for kind in NETWORKS for fold in FOLDS if (fold, kind) not in self.weights]
        parts = [(kind, [fold for fold, other in gone if other == kind]) for kind in NETWORKS]
        (_, first), (_, second) = parts
        if first == second:
            return f"without fold {', '.join(first)}" if first else ""
        return "without " + " and ".join(f"fold {', '.join(folds)} of {kind}" for kind, folds in parts if folds)


def swan_fold_folders(folder: Path) -> dict[str, Path]:
    """Return the folders fold0, fold1, ... in their order."""
    names = {path.name.removeprefix("fold"): path for path in folder.glob("fold*") if path.is_dir()}
    numbered = {name: path for name, path in names.items() if name.isascii() and name.isdecimal()}
    return {name: numbered[name] for name in sorted(numbered, key=int)}


def read_swan_folder(folder: Path) -> SwanFolder:
    """Return the weight files in a folder of SWAN. Raises WeightsBroken if there are none, or if a fold has several of one network."""
    with convert_folder_errors(folder):
        folds = swan_fold_folders(folder)
        weights = {
            (fold, kind): _weights_of(path / kind)
            for kind in NETWORKS
            for fold, path in folds.items()
            if (path / kind).is_dir()
        }
    if not weights:
        raise WeightsBroken(
            "the folder has no networks of SWAN",
            where=folder,
            found=describe_weights_folder(folder),
            do=f"give the folder with {_LAYOUT}",
        )
    return SwanFolder(weights)


def _weights_of(folder: Path) -> Path:
    if (packed := folder / PACKED).is_file():
        return packed
    place = folder.joinpath(*CHECKPOINTS)
    found = sorted(path for path in place.glob(f"*{SUFFIX}") if path.is_file())
    if len(found) != 1:
        raise WeightsBroken(
            f"a fold has {len(found)} checkpoints of one network",
            where=place,
            found=describe_weights_folder(place),
            do=f"keep the published one ({_LAYOUT}); or remove the folder {folder.parent.name}/{folder.name}",
        )
    return found[0]
