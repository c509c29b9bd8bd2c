"""nnU-Net v1's U-Net (`Generic_UNet` as nnUNetTrainerV2 builds it in 3-D), with the parameter names of its checkpoints.

Strided convolutions down, transposed convolutions up, instance normalisation, leaky ReLU; a segmentation head on each level of the
way up, for training by deep supervision. All heads are here, so that checkpoints fit exactly; only the last one speaks.
"""

from __future__ import annotations

import torch
from torch import nn

from ensemble.families.nnunet_v1.plans import MAX_FEATURES, NnunetV1Plans, Sizes

SLOPE = 0.01


class ConvNormNonlin(nn.Module):
    """Convolution, instance normalisation, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Sizes, stride: Sizes) -> None:
        super().__init__()
        z, y, x = kernel
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=(z // 2, y // 2, x // 2))
        self.instnorm = nn.InstanceNorm3d(outputs, eps=1e-5, affine=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, Z, Y, X) to (N, outputs, Z', Y', X')."""
        normalised = self.instnorm(self.conv(maps))
        return nn.functional.leaky_relu_(normalised, SLOPE)


class StackedConvs(nn.Module):
    """A stack of convolutions; the first one changes the number of feature maps and may have a stride."""

    def __init__(self, inputs: int, outputs: int, count: int, kernel: Sizes, stride: Sizes = (1, 1, 1)) -> None:
        super().__init__()
        first = ConvNormNonlin(inputs, outputs, kernel, stride)
        rest = (ConvNormNonlin(outputs, outputs, kernel, (1, 1, 1)) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, Z, Y, X) to (N, outputs, Z', Y', X')."""
        stacked: torch.Tensor = self.blocks(maps)
        return stacked


class NnunetV1Network(nn.Module):
    """The U-Net: returns logits of background and lesion for windows whose sizes are divisible by its pooling.

    Attributes are named as in nnU-Net v1: context is the encoder (bottleneck last), `tu` the upsampling, localization the decoder.
    """

    def __init__(self, channels: int, classes: int, plans: NnunetV1Plans) -> None:
        super().__init__()
        levels, convolutions = len(plans.pools), plans.convolutions
        features = [min(plans.base_features * 2**level, MAX_FEATURES) for level in range(levels + 1)]
        strides: list[Sizes] = [(1, 1, 1), *plans.pools]
        down: list[nn.Module] = [
            StackedConvs(inputs, outputs, convolutions, kernel, stride)
            for inputs, outputs, kernel, stride in zip(
                [channels, *features[:-2]], features[:-1], plans.kernels[:-1], strides[:-1], strict=True
            )
        ]
        deepest = plans.kernels[-1]
        down.append(
            nn.Sequential(
                StackedConvs(features[-2], features[-1], convolutions - 1, deepest, strides[-1]),
                StackedConvs(features[-1], features[-1], 1, deepest),
            )
        )
        upwards = range(levels - 1, -1, -1)
        self.conv_blocks_context = nn.ModuleList(down)
        self.tu = nn.ModuleList(
            nn.ConvTranspose3d(features[level + 1], features[level], plans.pools[level], plans.pools[level], bias=False)
            for level in upwards
        )
        # the decoder uses the kernel of the stage below, as in nnU-Net v1
        self.conv_blocks_localization = nn.ModuleList(
            nn.Sequential(
                StackedConvs(2 * features[level], features[level], convolutions - 1, plans.kernels[level + 1]),
                StackedConvs(features[level], features[level], 1, plans.kernels[level + 1]),
            )
            for level in upwards
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(features[level], classes, 1, bias=False) for level in upwards)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes, Z, Y, X) of windows (N, channels, Z, Y, X), at full resolution."""
        *stages, bottleneck = self.conv_blocks_context
        maps, skips = windows, []
        for stage in stages:
            maps = stage(maps)
            skips.append(maps)
        maps = bottleneck(maps)
        for upsample, localize in zip(self.tu, self.conv_blocks_localization, strict=True):
            maps = localize(torch.cat((upsample(maps), skips.pop()), dim=1))
        logits: torch.Tensor = self.seg_outputs[-1](maps)
        return logits


def build_nnunet_v1_network(plans: NnunetV1Plans) -> NnunetV1Network:
    """Build the network without memory for its weights (on the meta device); `checkpoints.load_weights` fills them in."""
    with torch.device("meta"):
        return NnunetV1Network(len(plans.modalities), 2, plans)
