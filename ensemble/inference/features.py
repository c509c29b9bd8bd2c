"""Encoder features of an image: the maps of one layer, pooled over all windows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ensemble.types import FloatArray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PooledFeatures:
    """The pooled encoder features of one image."""

    whole: FloatArray
    """(D,) float32: mean over all of the image that is not 0."""
    foreground: FloatArray | None
    """(D,) float32: mean over the voxels that the network assigns to any class but the first; None if there are none."""


class FeaturePool:
    """Averages a layer's maps (N, D, z, y, x) over all windows, in float64 and in window order, so that threads do not change the result.

    The weight of a map's cell is the number of image voxels, or of foreground voxels, in it. Overlapping windows both count.
    An error here, even of memory, only loses the features; the predictions remain.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Discard everything, because the inference is restarted."""
        self._sums: list[torch.Tensor] = []
        self._weights = torch.zeros(2, dtype=torch.float64)
        self._failed = False

    def add(self, windows: torch.Tensor, logits: torch.Tensor, maps: torch.Tensor) -> None:
        """Add windows (N, C, Z, Y, X), the network's logits (N, K, Z, Y, X) and its maps (N, D, z, y, x); z = 1 for 2-D networks."""
        if self._failed:
            return
        try:
            self._add(windows, logits, maps)
        except Exception as error:
            log.warning("no features could be computed for this image (%s: %s)", type(error).__name__, error)
            self._failed = True

    def _add(self, windows: torch.Tensor, logits: torch.Tensor, maps: torch.Tensor) -> None:
        inside = (windows != 0).any(1)
        foreground = logits[:, 1:].amax(1) > logits[:, 0]  # argmax takes eighty times as long
        shares = torch.stack([inside, inside & foreground], 1).float()
        z, y, x = maps.shape[2:]
        cells = torch.nn.functional.adaptive_avg_pool3d(shares, (z, y, x)).cpu().double()
        for weight, window in zip(cells, maps.cpu().double(), strict=True):
            self._sums.append(torch.stack([(share * window).sum((1, 2, 3)) for share in weight]))
            self._weights += weight.sum((1, 2, 3))

    def features(self) -> PooledFeatures | None:
        """Return the means; None for an empty image, non-finite maps, or a failure while adding."""
        total = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(2, 0)
        if self._failed or self._weights[0] == 0 or not total.isfinite().all():
            return None
        whole, foreground = (total / self._weights[:, None]).float().numpy()
        return PooledFeatures(whole, foreground if self._weights[1] > 0 else None)


class RegionFeaturePool:
    """Averages the maps of all encoder stages over regions of an image, in float64 and in the order of the windows."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(self, shares: torch.Tensor, stages: Sequence[torch.Tensor]) -> None:
        """Add windows' maps (N, D, z, y, x), one tensor a stage. `shares` (N, R, Z, Y, X): how far each voxel belongs to each region.

        A cell of a map counts by the share of its voxels.
        """
        if not self._sums:
            regions = shares.shape[1]
            self._sums = [torch.zeros(regions, maps.shape[1], dtype=torch.float64) for maps in stages]
            self._weights = [torch.zeros(regions, 1, dtype=torch.float64) for _ in stages]
        for number, maps in enumerate(stages):
            z, y, x = maps.shape[2:]
            cells = torch.nn.functional.adaptive_avg_pool3d(shares, (z, y, x)).to(maps)
            self._sums[number] += torch.einsum("nrzyx,ndzyx->rd", cells, maps).cpu().double()
            self._weights[number] += cells.sum((0, 2, 3, 4))[:, None].cpu().double()

    def means(self) -> tuple[FloatArray, ...]:
        """Return the mean of each region (R, D) float32, one array a stage; nan for a region that no window held."""
        return tuple((sums / weights).float().numpy() for sums, weights in zip(self._sums, self._weights, strict=True))
