"""A PyTorch module as a Session."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules.conv import _ConvNd

from ensemble.inference.device import reproducible_arithmetic
from ensemble.inference.export import EncoderOnly, TappedNetwork
from ensemble.inference.precision import DTYPES, ResolvedPrecision, resolve_precision


class TorchSession:
    """Runs a 2-D or 3-D PyTorch network unchanged, on one device.

    In fp16 and bf16 the convolutions' weights are held in that precision and the normalisations' in float32, which is what autocast
    computes, without casting weights anew for each window. What is returned is float32 in any case.

    While it runs on CUDA, cuDNN is held to what `device.reproducible_arithmetic` says, so that a case gives the same mask each time.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        dims: int,
        device: str | torch.device,
        precision: ResolvedPrecision | None = None,
        tap: str = "",
    ) -> None:
        """`tap` names the layer whose maps it returns in addition to the logits."""
        if dims not in (2, 3):
            raise ValueError(f"networks have 2 or 3 spatial dimensions, not {dims}")
        self.device = torch.device(device)
        self.dims, self.tap = dims, tap
        self.precision = precision or resolve_precision("auto", self.device)
        self.network = network.to(self.device).eval()
        if self.precision != "fp32":
            for layer in self.network.modules():
                if isinstance(layer, _ConvNd | torch.nn.Linear):
                    layer.to(DTYPES[self.precision])

    @property
    def arithmetic(self) -> str:
        """Precision."""
        return self.precision

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) float32 of windows (N, C, Z, Y, X) float32, on the device of the windows; Z = 1 for 2-D networks."""
        (logits,) = self._answers(windows, lambda inputs: (self.network(inputs),))
        return logits

    def tapped(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, and the tapped layer's maps (N, D, z, y, x)."""
        logits, maps = self._answers(windows, TappedNetwork(self.network, self.tap))
        return logits, maps

    def encoded(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps (N, D, z, y, x) of each encoder stage, first to last; the decoder is not computed."""
        return self._answers(windows, EncoderOnly(self.network, self.tap))

    def _answers(
        self, windows: torch.Tensor, network: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    ) -> list[torch.Tensor]:
        inputs = windows.to(self.device)
        if self.dims == 2:
            inputs = inputs.squeeze(2)
        with torch.inference_mode(), reproducible_arithmetic(self.device):
            outputs = network(inputs.to(DTYPES[self.precision]))
        if self.dims == 2:
            outputs = tuple(output.unsqueeze(2) for output in outputs)
        return [output.to(device=windows.device, dtype=torch.float32).contiguous() for output in outputs]
