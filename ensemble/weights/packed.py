"""Packed weights: a safetensors file of tensors and string metadata. Reading it runs no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ensemble.errors import WeightsBroken
from ensemble.files import error_in_words, open_file, parse_json, size_in_words, unreadable_reason
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.program import command_line

SUFFIX = ".safetensors"
PackedPrecision = Literal["fp32", "fp16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
#: Metadata key for further names of shared tensors: {other name: first name}.
_ALIASES = "aliases"


def read_packed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors (on the CPU, memory-mapped) and metadata. Raises WeightsBroken if the file is missing or damaged."""
    try:
        open_file(path).close()
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            metadata = dict(file.metadata() or {})
        aliases: dict[str, str] = parse_json(metadata.pop(_ALIASES, "{}"))
        return tensors | {name: tensors[first] for name, first in aliases.items()}, metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise WeightsBroken(
                "there is not enough memory to read the weights of a packed member",
                where=path,
                found=size_in_words(path),
                do=MORE_MEMORY,
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            why = unreadable_reason(path, error)
            raise WeightsBroken(
                f"the weights file of a packed member {why.what}", where=path, found=why.found, do=why.do
            ) from error
        raise WeightsBroken(
            "the weights file of a packed member is damaged",
            where=path,
            found=error_in_words(error)[:200],
            do=f"copy it again, or make it again from the original weights: {command_line('members pack SRC DST')}",
        ) from error


def write_packed(
    path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], precision: PackedPrecision
) -> None:
    """Write the weights of one network; a tensor with several names is written once.

    fp16 halves kernels; biases and the parameters and statistics of normalisation, which are small, stay float32. fp32 keeps every bit.
    Raises WeightsBroken for weights that are not finite, or too large for fp16.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[object, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first_names:
            aliases[name] = first_names[place]
            continue
        first_names[place] = name
        tensors[name] = _kept(name, tensor, precision)
    path.write_bytes(save(tensors, dict(metadata) | ({_ALIASES: json.dumps(aliases)} if aliases else {})))


def _kept(name: str, tensor: torch.Tensor, precision: PackedPrecision) -> torch.Tensor:
    """Return a contiguous copy in the precision to be written."""
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    dtype = _DTYPES[precision] if tensor.ndim > 1 else torch.float32
    kept = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not kept.isfinite().all():
        if not tensor.isfinite().all():
            raise WeightsBroken(
                "the weights contain NaN or infinite values",
                found=f"in the tensor {name}",
                do="restore the original weights",
            )
        raise WeightsBroken(
            f"weights are too large for {precision}",
            found=f"{name} reaches {float(tensor.abs().max()):g}",
            do="pack with --precision fp32",
        )
    return kept
