"""The two networks of SWAN (factorizer-isles22), with the parameter names of their checkpoints: ResUNet and Swin Factorizer.

Layouts are those of Ashtari et al., "Factorizer: A scalable interpretable approach to context modeling for medical image segmentation"
(Medical Image Analysis 2023) and its public code (github.com/pashtari/factorizer). Both are U-Nets of five levels whose blocks differ; a
head on each of the finest levels, for training by deep supervision. All heads are here, so that checkpoints fit exactly; one speaks.

Arrays are (N, C, X, Y, Z): these networks know images in that order of axes. Dropout is omitted: it is for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional

from ensemble.families.group_norm import Float32GroupNorm

#: Window for which the networks were built; the Swin Factorizer accepts no other.
WINDOW = (64, 64, 64)
#: Feature maps of the published networks, from the finest level to the coarsest.
WIDTHS = (32, 64, 128, 256, 512)
CHANNELS = 3
_GROUPS, _SLOPE = 8, 0.01
#: Of the Swin Factorizer: rows of a matrix (feature maps of a head), edge of a patch whose voxels are its columns, shifts of the patches.
HEAD, PATCH, SHIFTS = 8, 4, (0, 1, 2, 3)
_ITERATIONS, _EPS = 5, 1e-8


class UNet(nn.Module):
    """A U-Net built of any kind of block. Attributes are named as in the checkpoints."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], widths: Sequence[int], heads: int) -> None:
        """`block` makes one from its level, inputs and outputs."""
        super().__init__()
        levels = range(len(widths))
        self.stem = nn.Conv3d(CHANNELS, widths[0], 3, padding=1, bias=False)
        self.encoder = _Levels(_Down(block, level, widths) for level in levels)
        self.decoder = _Levels(_Up(block, level, widths) for level in reversed(levels[:-1]))
        self.heads = nn.ModuleList(nn.Conv3d(width, 1, 1) for width in widths[:heads])

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 2, X, Y, Z) of windows (N, channels, X, Y, Z); the background logit is always 0."""
        logits = self.heads[0](self.levels(windows)[0])
        return torch.cat((torch.zeros_like(logits), logits), dim=1)

    def levels(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Return the decoder's feature maps, finest level first, without the bottleneck."""
        maps, skips = self.stem(windows), []
        for down in self.encoder.blocks:
            maps = down(maps)
            skips.append(maps)
        maps, found = skips.pop(), []
        for up in self.decoder.blocks:
            maps = up(maps, skips.pop())
            found.append(maps)
        return found[::-1]


class _Levels(nn.Module):
    """The levels of the encoder or the decoder."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class _Down(nn.Module):
    """An encoder level: all but the finest halve the image first."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], level: int, widths: Sequence[int]) -> None:
        super().__init__()
        width = widths[level]
        halving = [nn.Conv3d(widths[level - 1], width, 2, stride=2, bias=False)] if level else []
        self.blocks = nn.Sequential(*halving, block(level, width, width))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(maps)
        return found


class _Up(nn.Module):
    """A decoder level, with its skip connection."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], level: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(widths[level + 1], widths[level], 2, stride=2)
        self.blocks = nn.Sequential(block(level, 2 * widths[level], widths[level]))

    def forward(self, maps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(torch.cat((skip, self.upsample(maps)), dim=1))
        return found


class ResidualBlock(nn.Module):
    """Two convolutions with group normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.norm1 = Float32GroupNorm(_GROUPS, outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.norm2 = Float32GroupNorm(_GROUPS, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1, bias=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, X, Y, Z) to (N, outputs, X, Y, Z)."""
        inner = functional.leaky_relu_(self.norm1(self.conv1(maps)), _SLOPE)
        return functional.leaky_relu_(self.norm2(self.conv2(inner)) + self.shortcut(maps), _SLOPE)


class FactorizerBlock(nn.Module):
    """Low-rank approximation of patches, then a per-voxel MLP, each with a residual connection.

    Input and output are channels-first; it computes channels-last.
    """

    def __init__(self, inputs: int, outputs: int, positions: Sequence[int] = ()) -> None:
        """`positions`: the only possible image size, for a network with learned position embeddings."""
        super().__init__()
        self.adapter = nn.Sequential(Linear(inputs, outputs, bias=False)) if inputs != outputs else nn.Identity()
        if positions:
            self.pos_embed = PositionalEmbedding(outputs, positions)
        self.blocks = nn.ModuleDict(
            {name: Residual(LayerNorm(outputs), inner(outputs)) for name, inner in (("nmf", LowRank), ("mlp", MLP))}
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, inputs, X, Y, Z) to (N, outputs, X, Y, Z)."""
        maps = self.adapter(maps.permute(0, 2, 3, 4, 1))
        if hasattr(self, "pos_embed"):
            maps = self.pos_embed(maps)
        for block in self.blocks.values():
            maps = block(maps)
        return maps.permute(0, 4, 1, 2, 3)


class Linear(nn.Module):
    """A linear map of the channels of each voxel: (..., inputs) to (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Conv1d(inputs, outputs, 1, bias=bias)  # as the checkpoints hold it

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return functional.linear(maps, self.linear.weight[..., 0], self.linear.bias)


class PositionalEmbedding(nn.Module):
    """Adds a learned embedding of each position."""

    def __init__(self, width: int, size: Sequence[int]) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, width, *size))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.pos.permute(0, 2, 3, 4, 1).to(maps.dtype)


class LayerNorm(nn.Module):
    """Normalisation over the channels (last axis), in float32 for any input precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = self.norm(maps.float())
        return normalised.to(maps.dtype)


class Residual(nn.Module):
    """A residual connection around some layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Sequential(*layers)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = maps + self.fn(maps)
        return added


class MLP(nn.Module):
    """Two linear maps with GELU between; parameters have indices 0 and 3, because a dropout follows each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(Linear(width, 2 * width), nn.GELU(), nn.Identity(), Linear(2 * width, width))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(maps)
        return found


class _Factorization(nn.Module):
    """The starting point of the iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.init = _Start()


class _Start(nn.Module):
    u0: torch.Tensor
    """(8, 1), in the checkpoints and without effect."""
    v0: torch.Tensor
    """(64, 1), random numbers of 0 to 1 that were drawn before training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u0", torch.zeros(HEAD, 1))
        self.register_buffer("v0", torch.zeros(PATCH**3, 1))


class LowRank(nn.Module):
    """Replaces each patch by its nonnegative rank-one approximation, averaged over shifted patches. Always in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = Linear(width, width, bias=False)
        self.factorize = _Factorization()
        self.out_proj = Linear(width, width)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, X, Y, Z, width) to the same shape."""
        inner = functional.relu(self.in_proj(maps)).float()
        total, start = torch.zeros_like(inner), self.factorize.init.v0[:, 0].float()
        for shift in SHIFTS:
            u, v = rank_one_factors(patches_to_matrices(inner, shift), start)
            total += matrices_to_patches(v[:, :, None] * u[:, None, :], shift, inner.shape)
        found: torch.Tensor = self.out_proj((total / len(SHIFTS)).to(maps.dtype))
        return found


def patches_to_matrices(maps: torch.Tensor, shift: int) -> torch.Tensor:
    """Cut (N, X, Y, Z, C), C = 8 heads, into patches as matrices (M, 64, 8): one row per voxel, one column per feature map.

    M = N heads patches.

    The image is first moved by `shift` voxels along each axis, what leaves it comes in on the other side.
    """
    moved = torch.roll(maps, (shift,) * 3, (1, 2, 3)) if shift else maps
    n, x, y, z, channels = maps.shape
    split = moved.reshape(n, x // PATCH, PATCH, y // PATCH, PATCH, z // PATCH, PATCH, channels // HEAD, HEAD)
    return split.permute(0, 7, 1, 3, 5, 2, 4, 6, 8).reshape(-1, PATCH**3, HEAD)


def matrices_to_patches(patches: torch.Tensor, shift: int, shape: Sequence[int]) -> torch.Tensor:
    """Undo `patches_to_matrices`."""
    n, x, y, z, channels = shape
    split = patches.reshape(n, channels // HEAD, x // PATCH, y // PATCH, z // PATCH, PATCH, PATCH, PATCH, HEAD)
    whole = split.permute(0, 2, 5, 3, 6, 4, 7, 1, 8).reshape(n, x, y, z, channels)
    return torch.roll(whole, (-shift,) * 3, (1, 2, 3)) if shift else whole


def rank_one_factors(rows: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors u (M, 8) and v (M, 64) of the nonnegative rank-one approximation of matrices (M, 64, 8) >= 0.

    The approximation is v u'.

    Hierarchical alternating least squares from v = `start` (64,) >= 0: u = (X v + eps) / (v'v + eps), then v likewise, five times. All but
    the last v is only met in products, which follow from G = X X' and s = X 1: these are 8 numbers a matrix, not 64.
    """
    gram, sums = rows.transpose(1, 2) @ rows, rows.sum(1)
    u = (start @ rows + _EPS) / (start @ start + _EPS)
    for _ in range(_ITERATIONS - 1):
        through = (gram @ u[:, :, None])[:, :, 0]
        norm = (u * u).sum(1, keepdim=True) + _EPS
        ones = rows.shape[1]
        square = (u * through).sum(1, keepdim=True) + 2 * _EPS * (u * sums).sum(1, keepdim=True) + ones * _EPS**2
        u = ((through + _EPS * sums) / norm + _EPS) / (square / norm**2 + _EPS)
    v = ((rows @ u[:, :, None])[:, :, 0] + _EPS) / ((u * u).sum(1, keepdim=True) + _EPS)
    return u, v


def build_resunet(widths: Sequence[int], heads: int) -> UNet:
    """Build the ResUNet, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        return UNet(lambda _, inputs, outputs: ResidualBlock(inputs, outputs), widths, heads)


def build_swin_factorizer(widths: Sequence[int], heads: int) -> UNet:
    """Build the Swin Factorizer, without memory for its weights."""
    coarsest = len(widths) - 1

    def block(level: int, inputs: int, outputs: int) -> nn.Module:
        places = [edge // 2**coarsest for edge in WINDOW] if level == coarsest else []
        return FactorizerBlock(inputs, outputs, places)

    with torch.device("meta"):
        return UNet(block, widths, heads)


#: By what the archive calls their folders.
ARCHITECTURES: dict[str, Callable[[Sequence[int], int], UNet]] = {
    "resunet": build_resunet,
    "swin-factorizer": build_swin_factorizer,
}
