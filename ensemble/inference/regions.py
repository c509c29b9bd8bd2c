"""Mean features of each encoder stage over regions of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ensemble.inference.engine import SlidingWindowConfig
from ensemble.inference.features import RegionFeaturePool
from ensemble.inference.tiling import Blending, Tiling
from ensemble.types import FloatArray

#: Windows do not overlap, since only means are computed from them.
_SIDE_BY_SIDE = Blending(step=1.0, sigma=None)


@torch.inference_mode()
def region_mean_features(
    image: torch.Tensor,
    shares: torch.Tensor,
    encoder: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    config: SlidingWindowConfig,
) -> tuple[FloatArray, ...]:
    """Return the mean feature vectors of R regions: for each encoder stage an array (R, D), D being its number of feature maps.

    Args:
        image: (C, Z, Y, X) float32.
        shares: (R, Z, Y, X) float32, how far each voxel belongs to each region.
        encoder: gives maps (N, D, z, y, x) of each stage for windows (N, C, Z, Y, X).
        config: the windows' size, and how many go through at once.
    """
    z, y, x = image.shape[1:]
    tiling = Tiling((z, y, x), config.window, _SIDE_BY_SIDE)
    margin = [n for pair in reversed(tiling.padding) for n in pair]
    image, shares = torch.nn.functional.pad(image, margin), torch.nn.functional.pad(shares, margin)
    pool, windows = RegionFeaturePool(), [window for window in tiling.windows() if shares[:, *window].any()]
    for first in range(0, len(windows), config.batch_size):
        batch = windows[first : first + config.batch_size]
        pool.add(torch.stack([shares[:, *w] for w in batch]), encoder(torch.stack([image[:, *w] for w in batch])))
    return pool.means()
