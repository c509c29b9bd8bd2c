"""The parity gate: check on a recorded window that another runtime gives the same mask as PyTorch.

The window is made for the network (it drives one half of the voxels to the foreground, the other to the background), so that agreement
on background alone proves nothing and a session that answers "all background" can't pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ensemble.inference.session import Session

MAX_DIFFERENCE, MIN_DICE = 1e-2, 0.999
_STEPS, _STEP = 24, 0.5


@dataclass(frozen=True)
class Probe:
    """A test window, and the network's output on it in PyTorch."""

    window: torch.Tensor
    """(1, C, Z, Y, X) float32; Z = 1 for 2-D networks."""
    foreground: torch.Tensor
    """(1, Z, Y, X) float32: probability that the class is not the first one."""


@dataclass(frozen=True)
class ParityResult:
    """How far a session's output on the probe differs from PyTorch's."""

    difference: float
    """Largest difference of a probability."""
    dice: float
    """Of the masks above 0.5."""

    @property
    def passed(self) -> bool:
        """Whether the session may replace the network."""
        return self.difference <= MAX_DIFFERENCE and self.dice >= MIN_DICE


def make_probe(network: torch.nn.Module, channels: int, window: Sequence[int]) -> Probe:
    """Make a small window (y, x or z, y, x) on which the network predicts both classes, by gradient ascent from fixed noise.

    Raises ValueError for a network that gives one class whatever is tried.
    """
    network = network.float().cpu().eval()
    values = torch.randn((1, channels, *window), generator=torch.Generator().manual_seed(0)).requires_grad_()
    sides = torch.ones(window[-1])
    sides[: window[-1] // 2] = -1
    for _ in range(_STEPS):
        logits = network(values)
        margin = logits[:, 1:].amax(1) - logits[:, 0]
        # margins are clamped: a pixel that is classified clearly enough needs no further change
        (gradient,) = torch.autograd.grad((margin * sides).clamp(max=4).mean(), values)
        with torch.no_grad():
            values += _STEP * gradient / gradient.abs().mean().clamp(min=1e-12)
    with torch.inference_mode():
        answer = foreground_probability(network(values))
    share = float((answer > 0.5).float().mean())
    if not 0.05 < share < 0.95:
        raise ValueError(f"no window was found on which the network gives both classes (foreground {share:.0%})")
    shape = (1, channels, *[1] * (3 - len(window)), *window)
    return Probe(values.detach().reshape(shape), answer.reshape(shape[:1] + shape[2:]))


def check_parity(session: Session, probe: Probe) -> ParityResult:
    """Run a session on the probe, and measure how far its output differs from the probe's."""
    answer = foreground_probability(session(probe.window))
    mask, expected = answer > 0.5, probe.foreground > 0.5
    both = int(mask.sum() + expected.sum())
    dice = 2 * int((mask & expected).sum()) / both if both else 0.0
    difference = float((answer - probe.foreground).abs().nan_to_num(nan=1.0).max())
    return ParityResult(difference, dice)


def foreground_probability(logits: torch.Tensor) -> torch.Tensor:
    """Return the probability (N, ...) of all classes but the first, from logits (N, K, ...)."""
    return 1 - logits.float().softmax(1)[:, 0]
