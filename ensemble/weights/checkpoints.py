"""Checkpoints as hostile input: tensors and plain values are read, code is not run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.errors import WeightsBroken
from ensemble.weights.folder import readable
from ensemble.weights.pickles import latin1

#: Wrappers that prefix a module's parameter names: data-parallel training, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
#: What torch's restricted unpickler says of a name that it does not admit, and what any reader says of damaged bytes.
_FORBIDDEN = re.compile(r"(?:GLOBAL|function|class) (\S+)")
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    zipfile.BadZipFile,
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, on the CPU; tensors are mapped from the file, not copied, where the format allows.

    Besides tensors and plain Python values only numpy scalars are admitted, which trainers leave in their logs (nnU-Net writes
    `_best_ema` and `logging` as such; nnU-Net v1 `plot_stuff`).

    Raises WeightsBroken for files that are missing, damaged, or hold anything else.
    """
    if not path.is_file():
        raise WeightsBroken("a checkpoint is missing", where=path, do="restore the weights folder")
    with readable(path):
        start = _start(path)
    archive = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except _UNREADABLE as error:
        if wanted := _FORBIDDEN.search(str(error)):
            raise WeightsBroken(
                "a checkpoint holds more than tensors and plain values; it was not loaded",
                where=path,
                found=f"it asks for {wanted[1]}",
                do="use the file that its trainer wrote; a checkpoint that needs other code to load can't be trusted",
            ) from error
        raise WeightsBroken(
            "a checkpoint is damaged, or is none",
            where=path,
            found=f"{type(error).__name__}: {error}"[:200] if archive else f"a file that starts with {start!r}",
            do="copy or download it again",
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsBroken("a checkpoint is not a dictionary", where=path, found=type(loaded).__name__)
    return loaded


def checkpoint_of(trainer: str, path: Path, key: str, name: str) -> dict[str, Any]:
    """A checkpoint with the weights that its trainer keeps under `key`, in files of that name. Raises WeightsBroken for any other."""
    content = read_checkpoint(path)
    if not isinstance(content.get(key), dict):
        raise WeightsBroken(
            f"a checkpoint is not of {trainer}",
            where=path,
            found=f"keys {', '.join(sorted(map(str, content))[:10])}; expected {key}",
            do=f"give the {name} that {trainer} wrote",
        )
    return content


def load_weights(network: torch.nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Put a state dictionary into a network, which may be on the meta device; half-precision weights become float32.

    Raises WeightsBroken, naming `path`, when names or shapes differ from the network's or when a weight is not finite.
    """
    state = {unwrapped(str(name)): _as_float32(tensor) for name, tensor in weights.items() if torch.is_tensor(tensor)}
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise WeightsBroken(
            "a checkpoint holds weights that are not finite numbers",
            where=path,
            found=f"{len(broken)} tensors, among them {broken[0]}",
            do="restore the file, or train again",
        )
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WeightsBroken(
            "a checkpoint does not fit the network that its plans describe",
            where=path,
            found="; ".join(line.strip()[:200] for line in str(error).splitlines()[1:4]),
            do="keep plans.json, dataset.json and checkpoint of one training together",
        ) from error


def unwrapped(name: str) -> str:
    """A parameter's name without the prefixes that wrappers of a network leave in its checkpoints."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that no longer depends on the mapped file (a trainer's channels-last weights would slow InstanceNorm down)."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(20)


def _numpy_scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    """What a pickled numpy scalar stands for, as a Python value: stands in for numpy's own function, which takes any object."""
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"numpy scalar of type {dtype} is not admitted")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0].item()


#: Pickle's name -> what is called for it. numpy 2 writes `numpy._core`, numpy 1 wrote `numpy.core`.
_NUMPY_SCALARS: list[Any] = [
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (latin1, "_codecs.encode"),
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bhilqBHILQefd"}, key=lambda kind: kind.__name__),
]
