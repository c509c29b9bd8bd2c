"""Choose the arithmetic precision of networks.

The gate: masks must agree with float32's to a Dice of 0.999 on every case tried. On GPUs float16 passes, which is nnU-Net's own choice
too (a T4 has no bfloat16). On CPUs bfloat16 does not (see docs/adr/0012); it is there for who asks for it, and for gated
mirroring, which promises less.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ensemble.config import Precision as Choice
from ensemble.errors import UsageError

ResolvedPrecision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_precision(choice: Choice, device: torch.device) -> ResolvedPrecision:
    """Return the precision for the user's choice. Raises UsageError if the device does not support it."""
    if choice == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if choice == "fp16" and device.type == "cpu":
        raise UsageError(
            "--precision fp16 works only on GPUs",
            found="device cpu",
            do="use --precision fp32 or bf16, or --device cuda",
        )
    return choice


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a CPU runs networks much faster in bfloat16 than in float32, and the system permits it.

    It does by AMX, and by AVX-512 BF16 on processors of AMD. On Intel's the latter multiply no more numbers a cycle than in float32: a
    network takes 1.7 times as long (docs/adr/0020).
    """
    if device.type != "cpu":
        return False
    if torch.cpu._is_amx_tile_supported():
        return torch.cpu._init_amx()
    return torch.cpu._is_avx512_bf16_supported() and _is_amd()


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a CPU multiplies bfloat16 in hardware: AMX or AVX-512 BF16.

    HD-BET's network, which PyTorch runs as it is, gains by either.
    """
    return has_fast_bfloat16(device) or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
