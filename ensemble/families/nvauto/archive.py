"""A TorchScript archive as data: its parameters and the text of its code. Nothing in it is run or compiled.

The archive is a zip of `data.pkl` (a tree of modules, with tensors that point to `data/N`), `code/**.py` and `constants.pkl`
(PyTorch, torch/csrc/jit/docs/serialization.md). The pickle's names are answered by stand-ins; any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ensemble.errors import WeightsBroken
from ensemble.files import open_file
from ensemble.weights.archives import archive_root, read_archive_file
from ensemble.weights.checkpoints import refuse_oversized_tensors
from ensemble.weights.damage import convert_weights_errors
from ensemble.weights.folder import convert_folder_errors

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_MAX_CODE_BYTES = 64 * 2**20


@dataclass
class ArchivedModule:
    """A network module read from a TorchScript archive without running it: the name of its class, and its attributes."""

    name: str = ""
    held: dict[str, Any] = field(default_factory=dict)
    """Submodules, tensors and plain values."""

    def __setstate__(self, state: Any) -> None:
        self.held = dict(state)


@dataclass(frozen=True)
class TorchScriptArchive:
    """The contents of a TorchScript archive."""

    root: ArchivedModule
    code: dict[str, str]
    """Texts by module: `__torch__.torch.nn.modules.conv`."""
    constants: tuple[Any, ...]
    parameters: dict[str, torch.Tensor]
    """Parameters and buffers by their names in the network."""


def read_torchscript_archive(path: Path, *, weights: bool = True) -> TorchScriptArchive:
    """Read a TorchScript file. Without weights, tensors have shapes but no values (device "meta"), and little is read.

    Raises WeightsBroken if the file is missing, damaged or no TorchScript, or holds more than modules and tensors."""
    try:
        with convert_weights_errors(path, "a TorchScript file", "read"):
            with convert_folder_errors(path), open_file(path) as opened, zipfile.ZipFile(opened) as file:
                archive = _read(file, weights)
            refuse_oversized_tensors(archive.parameters, path)
            return archive
    except _Forbidden as error:
        raise WeightsBroken(
            "a TorchScript file contains more than modules and tensors",
            where=path,
            found=f"it refers to {error}",
            do="use the published file; one that needs other code can't be trusted",
        ) from error


class _Forbidden(Exception):
    """A pickle refers to something other than modules and tensors."""


def _read(file: zipfile.ZipFile, weights: bool) -> TorchScriptArchive:
    folder = archive_root(file)
    texts = [
        info for info in file.infolist() if info.filename.startswith(f"{folder}code/") and info.filename.endswith(".py")
    ]
    if sum(info.file_size for info in texts) > _MAX_CODE_BYTES:
        raise ValueError("more code than a network has")
    code = {
        info.filename.removeprefix(f"{folder}code/").removesuffix(".py").replace("/", "."): file.read(info).decode()
        for info in texts
    }
    has_constants = f"{folder}constants.pkl" in file.namelist()
    constants = _Unpickler(file, f"{folder}constants", weights).load() if has_constants else ()
    root = _Unpickler(file, f"{folder}data", weights).load()
    if not isinstance(root, ArchivedModule):
        raise ValueError(f"{type(root).__name__} in the place of a network")
    return TorchScriptArchive(root, code, tuple(constants), dict(_tensors(root, "")))


class _Unpickler(pickle.Unpickler):
    """Allows only the archive's own classes, tensors and lists."""

    def __init__(self, file: zipfile.ZipFile, name: str, weights: bool) -> None:
        """`name` is that of the pickle without its ending, and of the folder of its tensors."""
        super().__init__(io.BytesIO(read_archive_file(file, f"{name}.pkl", _MAX_CODE_BYTES)))
        self._file, self._place, self._weights = file, f"{name}/", weights
        self._classes: dict[str, type[ArchivedModule]] = {}
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module.startswith("__torch__"):
            return self._classes.setdefault(full, _module_class(full))
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if full not in _STAND_INS:
            raise _Forbidden(full)
        return _STAND_INS[full]

    def persistent_load(self, identity: Any) -> torch.Tensor:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise _Forbidden(f"a {kind}")
        if not self._weights:
            return torch.empty(int(count), dtype=dtype, device="meta")
        if key not in self._storages:
            content = bytearray(read_archive_file(self._file, self._place + str(key)))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(self._storages[key]) < int(count):
            raise ValueError(f"tensor data {key} of {len(self._storages[key])} numbers, {count} expected")
        return self._storages[key]


def _module_class(name: str) -> type[ArchivedModule]:
    def make(cls: type[ArchivedModule], *_: Any) -> ArchivedModule:
        module = object.__new__(cls)
        module.name, module.held = name, {}
        return module

    return type("Module", (ArchivedModule,), {"__new__": make})


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    """Build a tensor on its storage. PyTorch checks that it lies within the storage."""
    return torch.as_strided(storage, size, stride, offset)


def _tensors(module: ArchivedModule, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, thing in module.held.items():
        if isinstance(thing, torch.Tensor):
            yield prefix + name, thing
        elif isinstance(thing, ArchivedModule):
            yield from _tensors(thing, f"{prefix}{name}.")


def _same(value: Any, *_: Any) -> Any:
    """Return the value itself, not a copy: a pickle may refer to one value any number of times."""
    return value


def _dictionary() -> dict[Any, Any]:
    return {}


_STAND_INS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "collections.OrderedDict": _dictionary,
    "torch.jit._pickle.restore_type_tag": _same,
    # lists, which scripted modules have as attributes
    "torch.jit._pickle.build_intlist": _same,
    "torch.jit._pickle.build_doublelist": _same,
    "torch.jit._pickle.build_boollist": _same,
    "torch.jit._pickle.build_tensorlist": _same,
}
