"""A PyTorch module as a Session."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn.modules.conv import _ConvNd

from ensemble.inference.device import exact
from ensemble.inference.fused import channels_last, fuse_layers, in_precision, replace_pools
from ensemble.inference.precision import DTYPES, ResolvedPrecision, has_fast_bfloat16, resolve_precision
from ensemble.memory import is_out_of_memory

log = logging.getLogger(__name__)

#: How far logits of a fused network may lie from the plain one's, relative to their range; measured 1e-6.
FUSED_TOLERANCE = 1e-4


class TorchSession:
    """Runs a network of two or three spatial dimensions on one device.

    On the CPU most networks run fused (see `fused.py`). Others, and all on CUDA, run as they are; in fp16 and bf16
    the convolutions' weights are held in that precision and the normalisations' in float32, which is what autocast computes, without
    casting weights anew for each window. What is returned is float32 in any case.

    While it runs on CUDA, cuDNN is held to what `device.exact` says, so that a case gives the same mask each time.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        dims: int,
        device: str | torch.device,
        precision: ResolvedPrecision | None = None,
        probe: Sequence[int] = (64, 64, 64),
    ) -> None:
        """`probe` is the size of a small window that the network takes (z, y, x, or y, x): on it the fused form must agree."""
        if dims not in (2, 3):
            raise ValueError(f"networks have 2 or 3 spatial dimensions, not {dims}")
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.dims = dims
        self.precision = precision or resolve_precision("auto", self.device)
        fused = self._fused(probe[-dims:]) if self.device.type == "cpu" else None
        self.fused = fused is not None
        dtype = DTYPES[self.precision]
        self.network = _held(self.network, dtype) if fused is None else in_precision(fused, dtype)

    @property
    def arithmetic(self) -> str:
        """Precision, and whether fused."""
        return f"{self.precision}, fused" if self.fused else self.precision

    @property
    def reduced_precision(self) -> TorchSession:
        """The same network in the fastest arithmetic that the device has in hardware, exact or not: itself where that is its own."""
        return self._coarse if self.fused and self.precision == "fp32" and has_fast_bfloat16(self.device) else self

    @cached_property
    def _coarse(self) -> TorchSession:
        other = copy.copy(self)
        other.precision, other.network = "bf16", in_precision(self.network, DTYPES["bf16"])
        return other

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) float32 of windows (N, C, Z, Y, X) float32, on the device of the windows; Z = 1 for 2-D networks."""
        inputs = windows.to(self.device)
        if self.dims == 2:
            inputs = inputs.squeeze(2)
        with torch.inference_mode(), exact(self.device):
            logits = self.network(self._arranged(inputs))
        if self.dims == 2:
            logits = logits.unsqueeze(2)
        return logits.to(device=windows.device, dtype=torch.float32).contiguous()

    def _arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """Channels last for fused networks, which choose their precision themselves; elsewhere instance normalisation is slower so."""
        return channels_last(inputs) if self.fused else inputs.to(DTYPES[self.precision])

    def _fused(self, probe: Sequence[int]) -> torch.nn.Module | None:
        """The fused network, if there is one and it gives the plain network's answer here."""
        fused = fuse_layers(self.network)
        if fused is None:
            return None
        channels = next(self.network.parameters()).shape[1]
        window = torch.randn((1, channels, *probe), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = self.network(window)
            try:
                apart = float((fused(channels_last(window)) - expected).abs().max())
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                log.warning("a fused network fails on this processor, the plain one runs: %s", error)
                return None
        if apart <= FUSED_TOLERANCE * max(1.0, float(expected.abs().max())):
            return fused
        log.warning("a fused network is %g away from its plain form on this processor: the plain one runs", apart)
        return None


def _held(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The network with its convolutions' weights in a precision; changed in place."""
    if dtype != torch.float32:
        for layer in network.modules():
            if isinstance(layer, _ConvNd | torch.nn.Linear):
                layer.to(dtype)
        if next(network.parameters()).device.type == "cpu":
            return replace_pools(network)
    return network
