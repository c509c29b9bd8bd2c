"""Sliding-window prediction with mirroring, over any network that is a Session. Knows nothing of what is segmented.

Reference: nnU-Net's predictor (Isensee et al., Nature Methods 2021): windows at half-window steps, blended by a Gaussian, mean over
mirrored passes. Its version 1 averages softmax, its version 2 logits; see `Average`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce

import torch

from ensemble.inference.mirroring import Flip, all_flips, tensor_dims
from ensemble.inference.session import Session
from ensemble.inference.tiling import Shape, Tiling, gaussian_importance
from ensemble.types import ProgressCallback, ignore_progress


class Average(Enum):
    """What is averaged over networks, flips and overlapping windows."""

    LOGITS = "logits"
    """As nnU-Net version 2."""
    PROBABILITIES = "probabilities"
    """Softmax over the classes, as nnU-Net version 1 and MONAI-style pipelines."""


class Tta(Enum):
    """Which mirrored passes are made."""

    MIRROR = "mirror"
    """All of them."""
    NONE = "none"
    """Only the unmirrored one."""
    GATED = "gated"
    """All of them in windows where the unmirrored pass leaves a doubt; see `SlidingWindow.certainty`."""


class NonFiniteLogits(ArithmeticError):
    """A network gave infinite or undefined values, so there is no prediction."""


@dataclass(frozen=True)
class SlidingWindow:
    """How an image is cut into windows, and how the networks' answers are put together."""

    window: Shape
    """Voxels of a window along z, y, x; 1 along z for 2-D networks."""
    mirror_axes: tuple[int, ...] = ()
    """Spatial axes (0 z, 1 y, 2 x) along which mirrored images look alike to the networks."""
    tta: Tta = Tta.MIRROR
    """Which mirrored passes are made."""
    average: Average = Average.LOGITS
    """What is averaged."""
    step: float = 0.5
    """Distance of neighbouring windows as a fraction of the window."""
    batch_size: int = 1
    """Windows that go through a network together; changes speed and memory, not results (beyond rounding)."""
    certainty: float = 0.95
    """With gated TTA a window is certain, and not mirrored, when the unmirrored pass gives each of its voxels one class with at
    least this softmax probability. The edge of an object is never that sharp: windows without one are spared."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size} is below 1")

    @property
    def flips(self) -> list[Flip]:
        """The passes that may be made of each window, the plain one first."""
        return all_flips(() if self.tta is Tta.NONE else self.mirror_axes)


@torch.inference_mode()
def predict(
    image: torch.Tensor,
    networks: Sequence[Session],
    how: SlidingWindow,
    progress: ProgressCallback = ignore_progress,
) -> torch.Tensor:
    """Mean of the networks' answers for a whole image.

    Args:
        image: (C, Z, Y, X) float32. Windows are cut and answers collected on its device; each Session moves what it needs.
        networks: folds or other networks of the same input and classes; every window goes through all of them.
        how: windows, mirroring and averaging.
        progress: called after each pass of a batch; a mirrored window counts as a window of its own, a spared one as done.

    Returns:
        (K, Z, Y, X) float32 on the image's device: logits, or probabilities where those are averaged. Of arrays of the image's
        size it is, with one channel of weights, all that is held.

    Raises:
        NonFiniteLogits: a network gave infinite or undefined values.
    """
    if not networks:
        raise ValueError("no networks to predict with")
    _, z, y, x = image.shape
    tiling = Tiling((z, y, x), how.window, how.step)
    padded = _padded(image, tiling)
    importance = torch.from_numpy(gaussian_importance(how.window)).to(image.device)
    weights = torch.zeros(tiling.padded, device=image.device)
    windows = tiling.windows()
    passes = _Passes(len(windows) * len(how.flips), progress)
    total: torch.Tensor | None = None
    for first in range(0, len(windows), how.batch_size):
        batch = windows[first : first + how.batch_size]
        answers = _answers(torch.stack([padded[:, *window] for window in batch]), networks, how, passes)
        if total is None:
            total = torch.zeros((answers.shape[1], *tiling.padded), device=image.device)
        for window, answer in zip(batch, answers.mul_(importance), strict=True):
            total[:, *window] += answer
            weights[window] += importance
    assert total is not None  # there is at least one window
    return total.div_(weights)[:, *tiling.inside]


def _padded(image: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """The image within zeros; itself where it needs none."""
    if tiling.padded == tiling.image:
        return image
    return torch.nn.functional.pad(image, [n for pair in reversed(tiling.padding) for n in pair])


def _answers(windows: torch.Tensor, networks: Sequence[Session], how: SlidingWindow, passes: _Passes) -> torch.Tensor:
    """Mean over networks and flips (N, K, Z, Y, X) for a batch of windows (N, C, Z, Y, X)."""
    plain, *mirrored = how.flips
    first = _pass(windows, networks, plain, how.average)
    passes.add(len(windows))
    doubtful = _doubtful(first, how) if how.tta is Tta.GATED else torch.arange(len(windows), device=windows.device)
    passes.add(len(mirrored) * (len(windows) - len(doubtful)))
    if not mirrored or len(doubtful) == 0:
        return first
    inputs, total = windows[doubtful], first[doubtful]
    for flip in mirrored:
        total += _pass(inputs, networks, flip, how.average)
        passes.add(len(doubtful))
    first[doubtful] = total / (len(mirrored) + 1)
    return first


def _pass(windows: torch.Tensor, networks: Sequence[Session], flip: Flip, average: Average) -> torch.Tensor:
    """Mean over networks of their answers to mirrored windows, mirrored back."""
    dims = tensor_dims(flip)
    inputs = windows.flip(dims) if dims else windows
    mean = reduce(torch.add, (_answer(network, inputs, average) for network in networks)) / len(networks)
    return mean.flip(dims) if dims else mean


def _answer(network: Session, windows: torch.Tensor, average: Average) -> torch.Tensor:
    """What is averaged of one network's output. Raises NonFiniteLogits."""
    logits = network(windows)
    if not torch.isfinite(logits).all():
        raise NonFiniteLogits(
            "a network's output is not finite: broken weights, or values beyond what its precision can hold"
        )
    return logits.softmax(1) if average is Average.PROBABILITIES else logits


def _doubtful(answers: torch.Tensor, how: SlidingWindow) -> torch.Tensor:
    """Indices of the windows (N, K, Z, Y, X) in which some voxel's likeliest class is less than `how.certainty` probable."""
    probabilities = answers if how.average is Average.PROBABILITIES else answers.softmax(1)
    likeliest = probabilities.amax(1).flatten(1)
    return (likeliest.amin(1) < how.certainty).nonzero().flatten()


class _Passes:
    """Counts windows that went through the networks, mirrored ones included."""

    def __init__(self, total: int, progress: ProgressCallback) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, count: int) -> None:
        if count:
            self._done += count
            self._progress(self._done, self._total)
