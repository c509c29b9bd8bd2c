"""Read untrusted checkpoints: tensors and plain values only; no code is run."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.errors import WeightsBroken
from ensemble.files import lexists, open_file
from ensemble.memory import is_out_of_memory
from ensemble.weights.damage import READ_ERRORS, damaged_weights_error
from ensemble.weights.folder import convert_folder_errors
from ensemble.weights.pickles import ForbiddenName
from ensemble.weights.programs import refuse_excessive_allocation

#: Wrappers that prefix a module's parameter names: data-parallel training, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
#: Messages of torch's restricted unpickler about a forbidden name, and of any reader about damaged bytes.
_FORBIDDEN = re.compile(r"(?:GLOBAL|function|class) (\S+)")
#: The program of a checkpoint, in bytes: names and shapes of tensors, a trainer's logs. Pickles in a file of the format before archives.
_MAX_PROGRAM_BYTES, _PICKLES = 64 << 20, 5
#: Most names of one tensor (nnU-Net's encoder has four).
_MAX_NAMES = 8


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, on the CPU; tensors are memory-mapped if the format allows.

    Besides tensors and plain Python values only numpy scalars are admitted, which trainers leave in their logs (nnU-Net writes
    `_best_ema` and `logging` as such; nnU-Net v1 `plot_stuff`).

    Raises WeightsBroken for files that are missing, damaged, or hold anything else.
    """
    refuse_unreadable_checkpoint(path)
    archive = zipfile.is_zipfile(path)
    try:
        _refuse_greedy(path, archive=archive)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        if not isinstance(loaded, dict):
            raise WeightsBroken(
                "a checkpoint is not a dictionary",
                where=path,
                found=type(loaded).__name__,
                do="use the file that the trainer wrote",
            )
        refuse_oversized_tensors(loaded, path)
    except READ_ERRORS as error:
        wanted = str(error) if isinstance(error, ForbiddenName) else _forbidden(error)
        if wanted:
            raise WeightsBroken(
                "a checkpoint contains more than tensors and plain values; it was not loaded",
                where=path,
                found=f"it refers to {wanted}",
                do="use the trainer's original file; a checkpoint that needs other code can't be trusted",
            ) from error
        found = "" if archive else f"a file that starts with {_start(path)!r}"
        raise damaged_weights_error(path, "a checkpoint", "load", error, found) from error
    return loaded


def refuse_unreadable_checkpoint(path: Path) -> None:
    """Raise WeightsBroken for a checkpoint that is missing, can't be opened, or is not a file."""
    if not lexists(path):
        raise WeightsBroken("a checkpoint is missing", where=path, do="restore the weights folder")
    with convert_folder_errors(path):
        open_file(path).close()


def _refuse_greedy(path: Path, *, archive: bool) -> None:
    """Raise UnpicklingError for a file that would expand far beyond its size, by compression or by calls."""
    if not archive:
        with path.open("rb") as file:
            for _ in range(_PICKLES):
                refuse_excessive_allocation(file)
        return
    with zipfile.ZipFile(path) as checkpoint:
        for member in checkpoint.infolist():
            program = member.filename.endswith("data.pkl")
            if member.compress_type != zipfile.ZIP_STORED or (program and member.file_size > _MAX_PROGRAM_BYTES):
                found = f"{member.filename} takes {member.file_size} bytes of {member.compress_size}"
                raise pickle.UnpicklingError(f"{found}; torch.save compresses nothing")
            if program:
                refuse_excessive_allocation(io.BytesIO(checkpoint.read(member)))


def refuse_oversized_tensors(content: Mapping[Any, Any], path: Path) -> None:
    """Raise WeightsBroken if the tensors, which may overlap in the file, are together far larger than it."""
    size = path.stat().st_size
    total, largest = 0, ("", 0)
    for name, tensor in _tensors(content, "", set()):
        needed = tensor.numel() * tensor.element_size()
        total, largest = total + needed, max(largest, (name, needed), key=lambda pair: pair[1])
    if largest[1] > size or total > _MAX_NAMES * size:
        raise WeightsBroken(
            "the tensors of a checkpoint are larger than its file",
            where=path,
            found=f"{total / 1e6:.0f} MB in a file of {size / 1e6:.1f} MB; the largest is {largest[0]}, {largest[1] / 1e6:.0f} MB",
            do="copy or download it again",
        )


def _tensors(content: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors in nested dictionaries, lists and tuples with their names, each container once."""
    if torch.is_tensor(content):
        yield name, content
    if not isinstance(content, dict | list | tuple) or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield from _tensors(value, f"{name}.{key}".strip("."), seen)


def read_trainer_checkpoint(trainer: str, path: Path, key: str, name: str) -> dict[str, Any]:
    """Return a checkpoint that has a trainer's weights under `key`; `name` is the trainer's file name, for messages.

    Raises WeightsBroken for any other content.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(key), dict):
        raise WeightsBroken(
            f"a checkpoint was not written by {trainer}",
            where=path,
            found=f"keys {', '.join(sorted(map(str, content))[:10])}; expected {key}",
            do=f"give the {name} that {trainer} wrote",
        )
    return content


def load_weights(network: torch.nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Load a state dictionary into a network, which may be on the meta device; half precision becomes float32.

    Raises WeightsBroken, naming `path`, when names or shapes differ from the network's or when a weight is not finite.
    """
    state = {
        strip_wrapper_prefixes(str(name)): _as_float32(tensor)
        for name, tensor in weights.items()
        if torch.is_tensor(tensor)
    }
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise WeightsBroken(
            "a checkpoint has weights that are not finite",
            where=path,
            found=f"{len(broken)} tensors, among them {broken[0]}",
            do="restore the file, or train again",
        )
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise WeightsBroken(
            "a checkpoint does not fit the network described by the files beside it",
            where=path,
            found="; ".join(line.strip()[:200] for line in str(error).splitlines()[1:4]),
            do="keep the files of one training together, with their original names",
        ) from error


def strip_wrapper_prefixes(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers such as DataParallel."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy independent of the mapped file (channels-last weights would slow InstanceNorm down)."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _forbidden(error: Exception) -> str:
    """Return the name that torch's unpickler refused; empty if it failed for another reason."""
    found = _FORBIDDEN.search(str(error))
    return found[1] if found else ""


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(20)


def _numpy_scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    """Return the Python value of a pickled numpy scalar; replaces numpy's own function, which accepts any object."""
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"numpy scalar of type {dtype} is not admitted")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0].item()


#: Name in the pickle -> function that is called for it. numpy 2 writes `numpy._core`, numpy 1 wrote `numpy.core`.
_NUMPY_SCALARS: list[Any] = [
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bhilqBHILQefd"}, key=lambda kind: kind.__name__),
]
