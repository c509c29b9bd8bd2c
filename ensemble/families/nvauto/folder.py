"""The files of NVAUTO's networks: `model0.ts`, `model1.ts`, ..., or packed `model0/network.safetensors` with `network.json`. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from ensemble.errors import WeightsBroken
from ensemble.program import command_line
from ensemble.weights.folder import convert_folder_errors, describe_weights_folder

SCRIPT_SUFFIX = ".ts"
PACKED_WEIGHTS, PACKED_FORM = "network.safetensors", "network.json"
_NAME = re.compile(r"model(?P<number>\d{1,4})", re.ASCII)
_SCRIPT = re.compile(rf"{_NAME.pattern}\{SCRIPT_SUFFIX}", re.ASCII)


def is_torchscript_name(path: Path) -> bool:
    """Return whether a file name is that of a TorchScript network of the archive."""
    return _SCRIPT.fullmatch(path.name) is not None


def network_files(folder: Path) -> dict[int, Path]:
    """Return the file of each network by number, in order. Raises WeightsBroken for a duplicate number or an unreadable folder."""
    found: dict[int, Path] = {}
    with convert_folder_errors(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            packed = path / PACKED_WEIGHTS
            match = _SCRIPT.fullmatch(path.name) or (_NAME.fullmatch(path.name) if packed.is_file() else None)
            if match is None:
                continue
            number, file = int(match["number"]), packed if packed.is_file() else path
            if number in found:
                raise WeightsBroken(
                    f"network {number} exists twice",
                    where=folder,
                    found=f"{found[number].relative_to(folder)}, {file.relative_to(folder)}",
                    do="keep one of them",
                )
            found[number] = file
    return dict(sorted(found.items()))


def require_network_files(folder: Path) -> dict[int, Path]:
    """Return the files as `network_files` does; also raise WeightsBroken if there are none."""
    if not (found := network_files(folder)):
        raise WeightsBroken(
            f"the folder has no network file model0{SCRIPT_SUFFIX}, model1{SCRIPT_SUFFIX}, ...",
            where=folder,
            found=describe_weights_folder(folder),
            do=f"give the folder NVAUTO/ts of DeepISLES' archive, or one written by {command_line('members pack SRC DST')}",
        )
    return found
