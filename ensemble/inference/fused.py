"""Convolutional networks as oneDNN computes them fastest on a CPU: batch normalisation folded into the convolutions, activations
applied while results are still in registers, channels last. The same function of the windows, up to rounding.

Folding: y = g (conv(x) + b - m) / sqrt(v + eps) + beta is a convolution with scaled kernels (Jacob et al., CVPR 2018, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMALISATIONS = (nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (nn.AvgPool2d, nn.AvgPool3d)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def fuse(network: nn.Module) -> nn.Module | None:
    """A copy for inference on the CPU that takes and gives channels-last windows, in float32 or bfloat16 alike; the network is left
    as it is. None where this can't be done: parameters outside of convolutions and foldable batch normalisations, or no oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return None
    if not all(_can_be_fused(layer) for layer in network.modules()):
        return None
    fused = copy.deepcopy(network).eval()
    replaced: dict[nn.Module, nn.Module] = {}
    for chain in list(fused.modules()):
        if isinstance(chain, nn.Sequential):
            _fold_chain(list(chain), replaced)
    for layer in fused.modules():
        if isinstance(layer, _CONVOLUTIONS) and layer not in replaced:
            replaced[layer] = FusedConvolution(layer, None, None)
        elif isinstance(layer, _TRANSPOSED):
            replaced[layer] = Transposed(layer)
    if not replaced or any(isinstance(layer, _NORMALISATIONS) and layer not in replaced for layer in fused.modules()):
        return None
    return _with(replace_pools(fused), replaced)


def replace_pools(network: nn.Module) -> nn.Module:
    """The network with mean pools that also take bfloat16 and channels last; changed in place."""
    pools = [layer for layer in network.modules() if isinstance(layer, _POOLS) and _can_be_fused(layer)]
    return _with(network, {pool: MeanPool(_stride(pool)) for pool in pools})


def _with(network: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(network, network)


def _has_own_state(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters(recurse=False)) or any(True for _ in layer.buffers(recurse=False))


def _can_be_fused(layer: nn.Module) -> bool:
    if isinstance(layer, _CONVOLUTIONS):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, _POOLS):
        return (
            layer.kernel_size == layer.stride and not any(_each(layer.padding, _stride(layer))) and not layer.ceil_mode
        )
    return not _has_own_state(layer) or isinstance(layer, (*_TRANSPOSED, *_NORMALISATIONS))


def _stride(pool: nn.Module) -> tuple[int, ...]:
    assert isinstance(pool, _POOLS)
    return _each(pool.stride, (2 if isinstance(pool, nn.AvgPool2d) else 3) * (0,))


def _each(value: int | tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * len(like) if isinstance(value, int) else tuple(value)


def _fold_chain(layers: list[nn.Module], replaced: dict[nn.Module, nn.Module]) -> None:
    """Convolution, dropout, batch normalisation, leaky ReLU in a row become one layer and layers that do nothing."""
    for at, layer in enumerate(layers):
        if not isinstance(layer, _CONVOLUTIONS) or layer in replaced:
            continue
        followers = iter(layers[at + 1 :])
        norm: nn.Module | None = None
        follower = _next(followers)
        if isinstance(follower, _NORMALISATIONS) and follower.running_var is not None:
            norm, follower = follower, _next(followers)
        activation = follower if isinstance(follower, nn.LeakyReLU | nn.ReLU) else None
        replaced[layer] = FusedConvolution(layer, norm, activation)
        replaced.update({used: nn.Identity() for used in (norm, activation) if used is not None})


def _next(layers: Iterator[nn.Module]) -> nn.Module | None:
    return next((layer for layer in layers if not isinstance(layer, _DROPOUTS)), None)


class _Weights:
    """Kernel and bias, in each precision that was asked for."""

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor | None) -> None:
        layout = torch.channels_last_3d if kernel.ndim == 5 else torch.channels_last
        self._kernel = kernel.detach().float().contiguous(memory_format=layout)
        self._bias = None if bias is None else bias.detach().float()
        self._cast: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def of(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dtype not in self._cast:
            self._cast[dtype] = (self._kernel.to(dtype), None if self._bias is None else self._bias.to(dtype))
        return self._cast[dtype]


class FusedConvolution(nn.Module):
    """Convolution with what follows it."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> None:
        super().__init__()
        assert isinstance(conv, _CONVOLUTIONS)
        kernel, bias = conv.weight.detach().double(), conv.bias
        if norm is not None:
            assert isinstance(norm, _NORMALISATIONS)
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            shift = (bias.double() if bias is not None else 0) - norm.running_mean.double()
            kernel = kernel * scale.view(-1, *[1] * (kernel.ndim - 1))
            bias = shift * scale + (norm.bias.double() if norm.bias is not None else 0)
        self._weights = _Weights(kernel, bias)
        self._geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self._activation: tuple[str, list[float], str] = ("none", [], "")
        if isinstance(activation, nn.LeakyReLU):
            self._activation = ("leaky_relu", [activation.negative_slope], "")
        elif activation is not None:
            self._activation = ("relu", [], "")

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, ...) to (N, outputs, ...), both channels last and of one precision; sums are float32 in either."""
        kernel, bias = self._weights.of(maps.dtype)
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            maps, kernel, bias, *self._geometry, *self._activation
        )
        return result


class Transposed(nn.Module):
    """Transposed convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, _TRANSPOSED)
        self._weights = _Weights(conv.weight, conv.bias)
        self._geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        self._function = nn.functional.conv_transpose2d if conv.weight.ndim == 4 else nn.functional.conv_transpose3d

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, ...) to (N, outputs, ...), in one precision."""
        return self._function(maps, *self._weights.of(maps.dtype), *self._geometry)  # type: ignore[arg-type]


class MeanPool(nn.Module):
    """Mean over blocks of voxels, which PyTorch has neither for bfloat16 nor for channels last in 3-D."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        super().__init__()
        self._stride = stride

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) to (N, C, ... / stride), in one precision; sums are float32. What does not fill a block is left out."""
        ends = [size - size % step for size, step in zip(maps.shape[2:], self._stride, strict=True)]
        total: torch.Tensor | None = None
        for corner in product(*(range(step) for step in self._stride)):
            places = [slice(at, end, step) for at, end, step in zip(corner, ends, self._stride, strict=True)]
            part = maps[:, :, *places]
            total = part.to(torch.float32, copy=True) if total is None else total.add_(part)
        assert total is not None
        layout = torch.channels_last_3d if maps.ndim == 5 else torch.channels_last
        return (total / prod(self._stride)).to(maps.dtype).contiguous(memory_format=layout)
