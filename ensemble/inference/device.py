"""Choose the device that networks run on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ensemble.config import Device
from ensemble.errors import UsageError


def resolve_device(choice: Device) -> str:
    """Return the torch device for the user's choice. Raises UsageError if a GPU is requested and PyTorch finds none."""
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UsageError(
            "--device cuda, but PyTorch sees no GPU",
            found=f"torch {torch.__version__}, built for CUDA {torch.version.cuda}",
            do="run the container with --gpus all, or use --device auto or cpu",
        )
    return "cuda" if available and choice != "cpu" else "cpu"


def describe_device(device: str) -> str:
    """Return a description of the device for the run report."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"cpu, {torch.get_num_threads()} threads"


def reproducible_arithmetic(device: torch.device) -> AbstractContextManager[object]:
    """Make GPU arithmetic reproducible inside the block: deterministic cuDNN algorithms and no TF32. Changes nothing on the CPU."""
    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[object] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags
