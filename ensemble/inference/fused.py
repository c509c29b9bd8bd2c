"""Convolutional networks as oneDNN computes them fastest on a CPU: batch normalisation folded into the convolutions, activations
applied while results are still in registers, channels last. The same function of the windows, up to rounding.

Folding: y = g (conv(x) + b - m) / sqrt(v + eps) + beta is a convolution with scaled kernels (Jacob et al., CVPR 2018, section 3.2).

In bfloat16 what costs next to nothing is held in float32, for its rounding is the same in all flips, so that no mean removes it: biases
of convolutions, the few channels that come in, and convolutions of single voxels that end a network or a residual block's skip.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from math import prod

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMALISATIONS = (nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMALISATIONS = (nn.InstanceNorm2d, nn.InstanceNorm3d)
_POOLS = (nn.AvgPool2d, nn.AvgPool3d)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
#: Blocks of voxels that are summed in float32 each, and together in float64: the smaller a block, the less is rounded away.
_BLOCKS = 256
#: Matrix units take bfloat16 inputs in blocks of 32 channels: three parts of this many fit into one.
_FEW_CHANNELS = 10


def fuse_layers(network: nn.Module) -> nn.Module | None:
    """A copy for inference on the CPU that takes and gives channels-last windows in float32; the network is left as it is. None where
    this can't be done: parameters outside of convolutions and foldable normalisations, or no oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return None
    if not all(_can_be_fused(layer) for layer in network.modules()):
        return None
    fused = copy.deepcopy(network).eval()
    replaced: dict[nn.Module, nn.Module] = {}
    chains = [list(chain) for chain in fused.modules() if isinstance(chain, nn.Sequential)]
    pools = {conv: pool for chain in chains for pool, conv in _pooled_convolutions(chain)}
    for chain in chains:
        _fold_chain(chain, pools, replaced)
    for layer in fused.modules():
        if isinstance(layer, _CONVOLUTIONS) and layer not in replaced:
            replaced[layer] = FusedConvolution(layer, None, None)
        elif isinstance(layer, _TRANSPOSED):
            replaced[layer] = Transposed(layer)
        elif isinstance(layer, _INSTANCE_NORMALISATIONS) and layer not in replaced:
            replaced[layer] = InstanceNormalisation(layer, None)
    if not replaced or any(isinstance(layer, _NORMALISATIONS) and layer not in replaced for layer in fused.modules()):
        return None
    return replace_pools(_with(fused, replaced))


def in_precision(fused: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A fused network that multiplies in another precision (float32, bfloat16). It still takes float32, and gives it where it ends in a
    convolution of single voxels with few outputs.
    """
    other = copy.deepcopy(fused)
    for layer in other.modules():
        if isinstance(layer, FusedConvolution | Transposed):
            layer.dtype = dtype
    return other


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
    if isinstance(layer, _INSTANCE_NORMALISATIONS):
        return not layer.track_running_stats
    return not _has_own_state(layer) or isinstance(layer, (*_TRANSPOSED, *_NORMALISATIONS))


def _stride(pool: nn.Module) -> tuple[int, ...]:
    assert isinstance(pool, _POOLS)
    return _each(pool.stride, (2 if isinstance(pool, nn.AvgPool2d) else 3) * (0,))


def _each(value: int | tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * len(like) if isinstance(value, int) else tuple(value)


def _pooled_convolutions(layers: list[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Mean pools whose result goes into a convolution of single voxels, with that convolution."""
    for pool, follower in pairwise(layers):
        first = next(layer for layer in follower.modules() if not list(layer.children()))
        convolutions = sum(isinstance(layer, _CONVOLUTIONS) for layer in follower.modules())
        if isinstance(pool, _POOLS) and convolutions == 1 and _is_pointwise(first):
            yield pool, first


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether it is a convolution that sees each voxel by itself."""
    if not isinstance(layer, _CONVOLUTIONS) or not _can_be_fused(layer):
        return False
    padded = any(_each(layer.padding, layer.stride))  # type: ignore[arg-type]
    return prod(layer.kernel_size) == prod(layer.stride) == prod(layer.dilation) == 1 and not padded


def _fold_chain(
    layers: list[nn.Module], pools: Mapping[nn.Module, nn.Module], replaced: dict[nn.Module, nn.Module]
) -> None:
    """Mean pool, convolution, dropout, batch normalisation, leaky ReLU in a row become one layer and layers that do nothing."""
    for at, layer in enumerate(layers):
        if not isinstance(layer, _CONVOLUTIONS) or layer in replaced:
            continue
        followers = iter(layers[at + 1 :])
        norm: nn.Module | None = None
        follower = _next(followers)
        if isinstance(follower, _INSTANCE_NORMALISATIONS) or (
            isinstance(follower, _NORMALISATIONS) and follower.running_var is not None
        ):
            norm, follower = follower, _next(followers)
        activation = follower if isinstance(follower, nn.LeakyReLU | nn.ReLU) else None
        pool = pools.get(layer)
        pooled = _stride(pool) if pool is not None else ()
        replaced.update({used: nn.Identity() for used in (pool, norm, activation) if used is not None})
        if isinstance(norm, _INSTANCE_NORMALISATIONS):
            replaced[layer] = FusedConvolution(layer, None, None, pooled, ends=activation is None)
            replaced[norm] = InstanceNormalisation(norm, activation)
        else:
            replaced[layer] = FusedConvolution(layer, norm, activation, pooled, ends=activation is None)


def _next(layers: Iterator[nn.Module]) -> nn.Module | None:
    return next((layer for layer in layers if not isinstance(layer, _DROPOUTS)), None)


class _Weights:
    """Kernel and bias (float32), the kernel in each precision that was asked for. Copies of a network share them."""

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().float()
        self._kernels = {torch.float32: channels_last(kernel.detach().float())}
        self._parts: dict[torch.dtype, torch.Tensor] = {}

    def __deepcopy__(self, memo: object) -> _Weights:
        return self

    def kernel(self, dtype: torch.dtype) -> torch.Tensor:
        """Rounded to a precision."""
        if dtype not in self._kernels:
            self._kernels[dtype] = self._kernels[torch.float32].to(dtype)
        return self._kernels[dtype]

    def parts(self, dtype: torch.dtype) -> torch.Tensor:
        """The kernel for maps in the parts of `_in_parts`."""
        if dtype not in self._parts:
            exact, coarse = self._kernels[torch.float32], self.kernel(dtype)
            self._parts[dtype] = channels_last(torch.cat([coarse, coarse, (exact - coarse).to(dtype)], dim=1))
        return self._parts[dtype]


def _in_parts(maps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Twice the accuracy of a precision: (coarse, rest, coarse), whose product with a kernel (coarse, coarse, rest) lacks rest * rest."""
    coarse = maps.to(dtype)
    return channels_last(torch.cat([coarse, (maps - coarse).to(dtype), coarse], dim=1))


def channels_last(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) as it is, its channels side by side in memory."""
    return maps.contiguous(memory_format=torch.channels_last_3d if maps.ndim == 5 else torch.channels_last)


class FusedConvolution(nn.Module):
    """Convolution with what follows it, and with the mean over blocks of `pool` voxels before it; `ends` if no activation follows."""

    def __init__(
        self,
        conv: nn.Module,
        norm: nn.Module | None,
        activation: nn.Module | None,
        pool: tuple[int, ...] = (),
        ends: bool = True,
    ) -> None:
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
        if pool:
            kernel = kernel.expand(*kernel.shape[:2], *pool) / prod(pool)
        stride = pool or conv.stride
        self.dtype = torch.float32
        self._weights = _Weights(kernel, bias)
        self._geometry = (list(conv.padding), list(stride), list(conv.dilation), conv.groups)
        size = kernel.shape[2:]
        # reads each voxel but once, so that what it multiplies in hardly matters; or skips so many that oneDNN's bfloat16 overruns memory
        self._in_float32 = (ends and tuple(size) == tuple(stride)) or any(
            step > n + 1 for n, step in zip(size, stride, strict=True)
        )
        self._few_inputs = conv.in_channels <= _FEW_CHANNELS and conv.groups == 1
        self._few_outputs = conv.out_channels <= _FEW_CHANNELS
        self._activation: tuple[str, list[float], str] = ("none", [], "")
        if isinstance(activation, nn.LeakyReLU):
            self._activation = ("leaky_relu", [activation.negative_slope], "")
        elif activation is not None:
            self._activation = ("relu", [], "")

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, ...) to (N, outputs, ...), both channels last; sums are float32 in any precision."""
        if self._in_float32 or self.dtype == torch.float32:
            result = self._convolved(maps.float(), self._weights.kernel(torch.float32))
            return result if self._few_outputs else result.to(self.dtype)
        if self._few_inputs:
            return self._convolved(_in_parts(maps.float(), self.dtype), self._weights.parts(self.dtype))
        return self._convolved(maps.to(self.dtype), self._weights.kernel(self.dtype))

    def _convolved(self, maps: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            maps, kernel, self._weights.bias, *self._geometry, *self._activation
        )
        return result


class InstanceNormalisation(nn.Module):
    """Each map of each window to mean 0 and variance 1, scale and shift, activation."""

    def __init__(self, norm: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        assert isinstance(norm, _INSTANCE_NORMALISATIONS)
        ones = torch.ones(norm.num_features)
        self._scale = ones if norm.weight is None else norm.weight.detach().float()
        self._shift = 0 * ones if norm.bias is None else norm.bias.detach().float()
        self._eps = norm.eps
        self._activation = activation or nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) channels last, in any precision, to the same."""
        normalised = [self._activation(self._normalised(window)) for window in maps.split(1)]
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)

    def _normalised(self, window: torch.Tensor) -> torch.Tensor:
        """With given moments batch normalisation is one pass; its own depend on the number of threads, and are less exact."""
        mean, variance = _moments(window.float())
        return nn.functional.batch_norm(window, mean.float(), variance.float(), self._scale, self._shift, eps=self._eps)


def _moments(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (float64) of each map of one window (1, C, ...), from float32 sums over blocks."""
    values = maps.movedim(1, -1).reshape(-1, maps.shape[1])
    count = len(values)
    whole = count - count % _BLOCKS

    def mean(numbers: torch.Tensor) -> torch.Tensor:
        blocks = numbers[:whole].view(_BLOCKS, -1, numbers.shape[1]).sum(1).double().sum(0)
        return (blocks + numbers[whole:].double().sum(0)) / count

    centre = mean(values)
    variance = mean(values * values) - centre**2
    if bool((variance < 1e-2 * centre**2).any()):  # nothing may be lost in the difference
        variance = mean((values - centre.float()) ** 2)
    return centre, variance


class Transposed(nn.Module):
    """Transposed convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, _TRANSPOSED)
        self.dtype = torch.float32
        self._weights = _Weights(conv.weight, conv.bias)
        self._geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        self._function = nn.functional.conv_transpose2d if conv.weight.ndim == 4 else nn.functional.conv_transpose3d

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, ...) to (N, outputs, ...); PyTorch wants the bias in the maps' precision here."""
        bias = None if self._weights.bias is None else self._weights.bias.to(self.dtype)
        return self._function(maps.to(self.dtype), self._weights.kernel(self.dtype), bias, *self._geometry)  # type: ignore[arg-type]


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
        return channels_last((total / prod(self._stride)).to(maps.dtype))
