"""Seeded random numbers and smooth random fields: everything random in the simulator comes from one `Draw`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


class Draw:
    """One stream of random numbers. Scalars are drawn on the CPU, so that a seed means the same case on every device."""

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def normal(self, mean: float = 0.0, std: float = 1.0) -> float:
        return mean + std * float(torch.randn((), generator=self._generator))

    def lognormal(self, median: float, sigma: float) -> float:
        return median * math.exp(self.normal(0.0, sigma))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number with low <= n < high."""
        return int(torch.randint(low, high, (), generator=self._generator))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options))]

    def quantile(self, probabilities: Sequence[float], values: Sequence[float]) -> float:
        """Draw from a distribution given by its quantiles; between them the logarithm is linear (values > 0)."""
        at = self.uniform(probabilities[0], probabilities[-1])
        for i in range(1, len(probabilities)):
            if at <= probabilities[i]:
                share = (at - probabilities[i - 1]) / (probabilities[i] - probabilities[i - 1])
                return values[i - 1] ** (1 - share) * values[i] ** share
        return values[-1]

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator).to(self.device)

    def field(self, shape: Sequence[int], cell_mm: float, channels: int = 1) -> Tensor:
        """Smooth random field (channels, z, y, x) on a 1 mm grid: mean 0, standard deviation near 1, `cell_mm` between knots."""
        knots = [max(2, round(n / cell_mm) + 1) for n in shape]
        coarse = self.randn([1, channels, *knots])
        fine = F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)[0]
        return fine * 1.5  # linear interpolation between independent knots keeps about 0.45 of the variance
