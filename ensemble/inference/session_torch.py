"""A PyTorch module as a Session."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def default_precision(device: torch.device) -> Precision:
    """float16 autocast on CUDA, as nnU-Net itself uses, which every supported GPU has in hardware (a T4 has no bf16); else float32."""
    return "fp16" if device.type == "cuda" else "fp32"


class TorchSession:
    """Runs a network of two or three spatial dimensions on one device.

    In fp16 and bf16 the convolutions are computed under autocast; weights stay float32, as does what is returned.

    While it runs on CUDA, cuDNN is held to deterministic algorithms, not chosen by trial, so that a case gives the same mask each time;
    the flags are restored afterwards.
    """

    def __init__(
        self, network: torch.nn.Module, *, dims: int, device: str | torch.device, precision: Precision | None = None
    ) -> None:
        if dims not in (2, 3):
            raise ValueError(f"networks have 2 or 3 spatial dimensions, not {dims}")
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.dims = dims
        self.precision = precision or default_precision(self.device)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) float32 of windows (N, C, Z, Y, X) float32, on the device of the windows; Z = 1 for 2-D networks."""
        inputs = windows.to(self.device)
        with torch.inference_mode(), self._autocast(), self._repeatable():
            logits = self.network(inputs) if self.dims == 3 else self.network(inputs.squeeze(2)).unsqueeze(2)
        return logits.to(device=windows.device, dtype=torch.float32)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def _repeatable(self) -> AbstractContextManager[object]:
        if self.device.type != "cuda":
            return nullcontext()
        flags: AbstractContextManager[object] = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True
        )
        return flags
