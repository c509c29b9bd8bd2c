"""Group normalisation for networks that run in half precision."""

from __future__ import annotations

import torch
from torch import nn


class Float32GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 for feature maps of any dtype; on GPUs, PyTorch refuses half-precision input otherwise."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Normalise feature maps (N, C, ...). The result has their shape and dtype."""
        return super().forward(maps.float()).to(maps.dtype)
