"""Group normalisation for networks that run in half precision."""

from __future__ import annotations

import torch
from torch import nn


class Float32GroupNorm(nn.GroupNorm):
    """Group normalisation in float32, whatever the precision of the maps; PyTorch accepts no mixture on GPUs."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Normalise maps (N, C, ...); shape and type are kept."""
        return super().forward(maps.float()).to(maps.dtype)
