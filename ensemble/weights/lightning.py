"""Read weights from PyTorch Lightning checkpoints, which pickle trainer objects beside the tensors. None of their code is run.

Such a file (`torch.save`'s zip: `<folder>/data.pkl`, the tensors' bytes as `<folder>/data/<key>`) names classes of the trainer, of metrics
and losses: none is imported. All names but those that build tensors are replaced by one stand-in that accepts anything and does nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ensemble.errors import WeightsBroken
from ensemble.weights.archives import archive_root, read_archive_file
from ensemble.weights.checkpoints import refuse_oversized_tensors, refuse_unreadable_checkpoint
from ensemble.weights.damage import convert_weights_errors

#: Pickles of trainers hold settings and optimizer states without their tensors: some 100 KB.
MAX_BYTES = 64 * 2**20
_MAX_AXES = 8
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Stored:
    """A tensor as the pickle describes it."""

    key: str
    """Of its bytes in the archive."""
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors under `state_dict`, on the CPU; no other data of the file is read.

    Raises WeightsBroken for files that are missing, damaged, or of another form.
    """
    refuse_unreadable_checkpoint(path)
    with convert_weights_errors(path, "a checkpoint", "load"), zipfile.ZipFile(path) as archive:
        folder = archive_root(archive)
        content = _unpickler(io.BytesIO(read_archive_file(archive, f"{folder}data.pkl", MAX_BYTES))).load()
        state = content.get("state_dict") if isinstance(content, dict) else None
        if isinstance(state, dict) and state:
            told = {name: tensor for name, tensor in state.items() if isinstance(tensor, _Stored)}
            tensors = dict(_tensors(archive, folder, told, path.stat().st_size))
            refuse_oversized_tensors(tensors, path)
            return {str(name): tensors[name] for name in told}
    keys = ", ".join(sorted(map(str, content))[:10]) if isinstance(content, dict) else type(content).__name__
    raise WeightsBroken(
        "a checkpoint was not written by PyTorch Lightning",
        where=path,
        found=f"{keys or 'nothing'}; expected state_dict",
        do="give the .ckpt that Lightning wrote",
    )


def _tensors(
    archive: zipfile.ZipFile, folder: str, state: Mapping[Any, _Stored], size: int
) -> Iterable[tuple[Any, torch.Tensor]]:
    """Yield the tensors of a state dictionary; each storage, which tensors may share, is read once."""
    by_key: dict[str, list[Any]] = {}
    for name, told in state.items():
        by_key.setdefault(told.key, []).append(name)
    whole = sum(archive.getinfo(f"{folder}data/{key}").file_size for key in by_key)
    if whole > size:
        raise pickle.UnpicklingError("its tensors are together larger than the file")
    for key, names in by_key.items():
        data = bytearray(read_archive_file(archive, f"{folder}data/{key}"))
        for name in names:
            yield name, _tensor(data, state[name])


def _tensor(data: bytearray, told: _Stored) -> torch.Tensor:
    """Return a tensor on its bytes.

    Raises RuntimeError or ValueError where it reaches beyond them, or repeats them to look larger than it is.
    """
    flat = torch.frombuffer(data, dtype=told.dtype) if data else torch.empty(0, dtype=told.dtype)
    if math.prod(told.size) > flat.numel():
        raise ValueError(f"a tensor of {told.size} in {len(data)} bytes")
    return torch.as_strided(flat, told.size, told.stride, told.offset)


def _unpickler(file: Any) -> pickle.Unpickler:
    """Return an unpickler that imports nothing. Its stand-in classes are new for each file, so no file can affect another."""

    class Ignored:
        """Stands in for every class and function: accepts any arguments and does nothing."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __new__(cls, *_: Any, **__: Any) -> Any:
            return super().__new__(cls)

        def _nothing(self, *_: Any, **__: Any) -> None:
            pass

        __setstate__ = __setitem__ = append = extend = add = update = _nothing

    def rebuild(storage: tuple[str, torch.dtype], offset: int, size: Any, stride: Any, *_: Any) -> _Stored:
        key, dtype = storage
        if not len(size) == len(stride) <= _MAX_AXES:
            raise pickle.UnpicklingError(f"a tensor of {len(size)} axes")
        return _Stored(key, dtype, int(offset), tuple(map(int, size)), tuple(map(int, stride)))

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def dictionary(*_: Any) -> dict[Any, Any]:
        return _Dictionary()

    known = {
        "collections.OrderedDict": dictionary,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_parameter": parameter,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module in ("torch", "torch.storage") and name in _DTYPES:
                return _DTYPES[name]
            return known.get(f"{module}.{name}", Ignored)

        def persistent_load(self, pid: Any) -> Any:
            _, dtype, key, *_ = pid
            return str(key), dtype

    return Unpickler(file)


class _Dictionary(dict[Any, Any]):
    """An ordered dictionary; torch leaves attributes on those of weights (`_metadata`), which are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass
