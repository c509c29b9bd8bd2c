"""MONAI's SegResNet and SegResNetDS, with the names of their parameters.

Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018; `monai/networks/nets/segresnet.py` and
`segresnet_ds.py` (MONAI 0.9 to 1.6). Sizes come from the weights' shapes, all else from a `SegResNetConfig`. The heads of deep supervision
are here, so that weights fit exactly; only the output of the last one is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from ensemble.families.group_norm import Float32GroupNorm

Shapes = Mapping[str, tuple[int, ...]]
Sizes = tuple[int, int, int]
SegResNetKind = Literal["SegResNet", "SegResNetDS"]
_NORMS, _ACTIVATIONS, _UPSAMPLINGS = ("group", "batch", "instance"), ("relu", "leaky_relu"), ("linear", "deconv")
_MAX_STRIDE, _MAX_LEVELS = 4, 10


@dataclass(frozen=True)
class SegResNetConfig:
    """The parts of a network's architecture that its weights' shapes do not determine."""

    network: SegResNetKind
    norm: str
    """group, batch or instance."""
    groups: int
    eps: float
    activation: str
    """relu or leaky_relu."""
    slope: float
    """Of the activation below 0."""
    upsampling: str
    """linear, or deconv: transposed convolutions."""
    strides: tuple[Sizes, ...]
    """From each level to the next."""
    channels: int
    features: int
    """Feature maps of the first level."""

    @property
    def smallest_window(self) -> Sizes:
        """A small window that all strides divide, with more than one voxel left at the bottleneck."""
        x, y, z = (2 * prod(stride[axis] for stride in self.strides) for axis in range(3))
        return x, y, z

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SegResNetConfig:
        """Read what `as_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        strides = tuple(tuple(int(n) for n in stride) for stride in content["strides"])
        form = cls(
            network=content["network"],
            norm=str(content["norm"]),
            groups=int(content["groups"]),
            eps=float(content["eps"]),
            activation=str(content["activation"]),
            slope=float(content["slope"]),
            upsampling=str(content["upsampling"]),
            strides=strides,  # type: ignore[arg-type]
            channels=int(content["channels"]),
            features=int(content["features"]),
        )
        if form.network not in ("SegResNet", "SegResNetDS"):
            raise ValueError(f"network {form.network!r}")
        for value, known in ((form.norm, _NORMS), (form.activation, _ACTIVATIONS), (form.upsampling, _UPSAMPLINGS)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if not 0 < len(strides) <= _MAX_LEVELS or any(
            len(stride) != 3 or not all(1 <= n <= _MAX_STRIDE for n in stride) for stride in strides
        ):
            raise ValueError(f"strides {strides}")
        if min(form.groups, form.channels, form.features) < 1 or not form.eps > 0:
            raise ValueError(
                f"{form.groups} groups, {form.channels} channels, {form.features} features, eps {form.eps}"
            )
        return form


def build_segresnet(form: SegResNetConfig, shapes: Shapes) -> nn.Module:
    """Build the network without memory for its weights (on the meta device).

    Raises KeyError or ValueError for shapes that don't fit such a network.
    """
    with torch.device("meta"):
        return SegResNet(form, shapes) if form.network == "SegResNet" else SegResNetDS(form, shapes)


class SegResNet(nn.Module):
    """MONAI's SegResNet: returns logits for windows whose sizes are divisible by its strides."""

    def __init__(self, form: SegResNetConfig, shapes: Shapes) -> None:
        super().__init__()
        self.convInit = _wrapped(_convolution(shapes, "convInit.conv"))
        self.down_layers = nn.ModuleList()
        for level in range(_count(shapes, "down_layers")):
            place = f"down_layers.{level}"
            first = (
                _wrapped(_convolution(shapes, f"{place}.0.conv", form.strides[level - 1])) if level else nn.Identity()
            )
            blocks = [_Block(form, shapes, f"{place}.{n}", ".conv") for n in _numbers(shapes, place) if n]
            self.down_layers.append(nn.Sequential(first, *blocks))
        self.up_layers, self.up_samples = nn.ModuleList(), nn.ModuleList()
        for level in range(_count(shapes, "up_samples")):
            blocks = [
                _Block(form, shapes, f"up_layers.{level}.{n}", ".conv") for n in _numbers(shapes, f"up_layers.{level}")
            ]
            self.up_layers.append(nn.Sequential(*blocks))
            place, stride = f"up_samples.{level}", form.strides[-1 - level]
            narrower = _wrapped(_convolution(shapes, f"{place}.0.conv"))
            self.up_samples.append(nn.Sequential(narrower, _upsampling(form, shapes, f"{place}.1", stride)))
        last = _convolution(shapes, "conv_final.2.conv")
        self.conv_final = nn.Sequential(
            _norm(form, shapes, "conv_final.0", last.in_channels), _activation(form), _wrapped(last)
        )

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) to (N, K, X, Y, Z)."""
        maps = self.convInit(windows)
        skips = []
        for layer in self.down_layers:
            maps = layer(maps)
            skips.append(maps)
        skips.pop()
        for layer, upsample in zip(self.up_layers, self.up_samples, strict=True):
            maps = layer(upsample(maps) + skips.pop())
        logits: torch.Tensor = self.conv_final(maps)
        return logits


class SegResNetDS(nn.Module):
    """MONAI's SegResNetDS: returns logits for windows whose sizes are divisible by its strides."""

    def __init__(self, form: SegResNetConfig, shapes: Shapes) -> None:
        super().__init__()
        self.encoder = _Encoder(form, shapes)
        self.up_layers = nn.ModuleList()
        for level in range(_count(shapes, "up_layers")):
            place = f"up_layers.{level}"
            blocks = [_Block(form, shapes, f"{place}.blocks.{n}") for n in _numbers(shapes, f"{place}.blocks")]
            has_head = f"{place}.head.weight" in shapes
            parts = {
                "upsample": _upsampling(form, shapes, f"{place}.upsample", form.strides[-1 - level]),
                "blocks": nn.Sequential(*blocks),
                "head": _convolution(shapes, f"{place}.head") if has_head else nn.Identity(),
            }
            self.up_layers.append(nn.ModuleDict(parts))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) to (N, K, X, Y, Z)."""
        *skips, maps = self.encoder(windows)
        for level in self.up_layers:
            maps = level["blocks"](level["upsample"](maps) + skips.pop())  # type: ignore[index]
        logits: torch.Tensor = self.up_layers[-1]["head"](maps)  # type: ignore[index]
        return logits


class _Encoder(nn.Module):
    def __init__(self, form: SegResNetConfig, shapes: Shapes) -> None:
        super().__init__()
        self.conv_init = _convolution(shapes, "encoder.conv_init")
        self.layers = nn.ModuleList()
        levels = _count(shapes, "encoder.layers")
        for level in range(levels):
            place = f"encoder.layers.{level}"
            blocks = [_Block(form, shapes, f"{place}.blocks.{n}") for n in _numbers(shapes, f"{place}.blocks")]
            inner = level < levels - 1
            down = _convolution(shapes, f"{place}.downsample", form.strides[level]) if inner else nn.Identity()
            self.layers.append(nn.ModuleDict({"blocks": nn.Sequential(*blocks), "downsample": down}))

    def forward(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of each level, the finest first."""
        maps, levels = self.conv_init(windows), []
        for level in self.layers:
            maps = level["blocks"](maps)  # type: ignore[index]
            levels.append(maps)
            maps = level["downsample"](maps)  # type: ignore[index]
        return levels


class _Block(nn.Module):
    """A residual block: normalisation, activation, convolution, twice. In SegResNet convolutions are wrapped."""

    def __init__(self, form: SegResNetConfig, shapes: Shapes, place: str, wrapper: str = "") -> None:
        super().__init__()
        first, second = (_convolution(shapes, f"{place}.conv{n}{wrapper}") for n in (1, 2))
        self.norm1 = _norm(form, shapes, f"{place}.norm1", first.in_channels)
        self.act1 = _activation(form)
        self.conv1 = _wrapped(first) if wrapper else first
        self.norm2 = _norm(form, shapes, f"{place}.norm2", second.in_channels)
        self.act2 = _activation(form)
        self.conv2 = _wrapped(second) if wrapper else second

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) to the same."""
        inner: torch.Tensor = self.conv1(self.act1(self.norm1(maps)))
        return self.conv2(self.act2(self.norm2(inner))) + maps


def _convolution(shapes: Shapes, place: str, stride: Sizes = (1, 1, 1)) -> nn.Conv3d:
    outputs, inputs, x, y, z = shapes[f"{place}.weight"]
    padding = (x // 2, y // 2, z // 2)
    return nn.Conv3d(inputs, outputs, (x, y, z), stride, padding, bias=f"{place}.bias" in shapes)


def _upsampling(form: SegResNetConfig, shapes: Shapes, place: str, stride: Sizes) -> nn.Module:
    """Build MONAI's `UpSample`; transposed convolutions are padded if their kernel size was given and differs from the stride."""
    if form.upsampling == "deconv":
        inputs, outputs, *kernel = shapes[f"{place}.deconv.weight"]
        pairs = list(zip(kernel, stride, strict=True))
        given = tuple(kernel) != tuple(stride)
        deconv = nn.ConvTranspose3d(
            inputs,
            outputs,
            tuple(kernel),  # type: ignore[arg-type]
            stride,
            padding=tuple((k - 1) // 2 for k, _ in pairs) if given else 0,  # type: ignore[arg-type]
            output_padding=tuple(s - 1 - (k - 1) % 2 for k, s in pairs) if given else 0,  # type: ignore[arg-type]
            bias=f"{place}.deconv.bias" in shapes,
        )
        return nn.Sequential(OrderedDict(deconv=deconv))
    x, y, z = (float(n) for n in stride)
    parts: dict[str, nn.Module] = {}
    if f"{place}.preconv.weight" in shapes:
        parts["preconv"] = _convolution(shapes, f"{place}.preconv")
    parts["upsample_non_trainable"] = nn.Upsample(scale_factor=(x, y, z), mode="trilinear", align_corners=False)
    return nn.Sequential(OrderedDict(parts))


def _norm(form: SegResNetConfig, shapes: Shapes, place: str, maps: int) -> nn.Module:
    affine = f"{place}.weight" in shapes
    if form.norm == "group":
        return Float32GroupNorm(form.groups, maps, form.eps, affine)
    if form.norm == "batch":
        return nn.BatchNorm3d(maps, form.eps, affine=affine)
    return nn.InstanceNorm3d(maps, form.eps, affine=affine)


def _activation(form: SegResNetConfig) -> nn.Module:
    return nn.LeakyReLU(form.slope, inplace=True) if form.activation == "leaky_relu" else nn.ReLU(inplace=True)


def _wrapped(convolution: nn.Conv3d) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=convolution))


def _numbers(shapes: Shapes, place: str) -> list[int]:
    """Return the numbers that follow a prefix in the names of weights."""
    depth = place.count(".") + 1
    found = {name.split(".")[depth] for name in shapes if name.startswith(f"{place}.")}
    return sorted(int(number) for number in found if number.isdecimal())


def _count(shapes: Shapes, place: str) -> int:
    """Return the number of levels; levels without weights of their own do not occur."""
    numbers = _numbers(shapes, place)
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{place}: levels {numbers}")
    return len(numbers)
