"""Small TorchScript files in NVAUTO's layout, traced and scripted, with fixed seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

#: Where DeepISLES' archive has them, below its `weights/`.
PUBLISHED = Path("NVAUTO/ts")


class Tiny(nn.Module):
    """Lesion where DWI, the second channel, is `level` deviations above the mean of what is not 0."""

    def __init__(self, level: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        assert self.conv.bias is not None
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[0.0, 0.0], [-0.5, 3.0]]).view(2, 2, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, -3.0 * level + shift]))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv(windows)
        return logits


def save_script(network: nn.Module, path: Path, *, traced: bool = True, window: Sequence[int] = (32, 32, 32)) -> Path:
    """Write a network as TorchScript."""
    path.parent.mkdir(parents=True, exist_ok=True)
    network = network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(network, torch.randn(1, 2, *window)) if traced else torch.jit.script(network)
        torch.jit.save(script, str(path))
    return path


def write_tiny(weights: Path, numbers: Sequence[int] = (0, 1), level: float = 1.0) -> Path:
    """An archive's folder of tiny networks that differ a little."""
    for number in numbers:
        save_script(Tiny(level, shift=0.1 * number), weights / PUBLISHED / f"model{number}.ts")
    return weights / PUBLISHED
