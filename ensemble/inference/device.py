"""Which processor the networks run on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ensemble.config import Device
from ensemble.errors import UsageError


def resolve_device(choice: Device) -> str:
    """The torch device for a choice of the user. Raises UsageError when a GPU is asked for and PyTorch sees none."""
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UsageError(
            "--device cuda, but PyTorch sees no GPU",
            found=f"torch {torch.__version__}, built for CUDA {torch.version.cuda}",
            do="run the container with --gpus all, or use --device auto or cpu",
        )
    return "cuda" if available and choice != "cpu" else "cpu"


def describe_device(device: str) -> str:
    """The device in words, for the run report."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"cpu, {torch.get_num_threads()} threads"


def exact(device: torch.device) -> AbstractContextManager[object]:
    """While it is entered, cuDNN uses deterministic algorithms, not chosen by trial, and float32 means float32: no TF32, which PyTorch
    permits in convolutions by default. Nothing changes on the CPU.
    """
    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[object] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags
