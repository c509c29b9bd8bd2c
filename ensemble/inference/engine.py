"""Sliding-window inference with mirroring, over any network that is a Session. Independent of what is segmented.

Reference: nnU-Net's predictor (Isensee et al., Nature Methods 2021): windows at half-window steps, blended by a Gaussian, mean over
mirrored passes. Its version 1 averages softmax, its version 2 logits; see `Averaging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import cast

import torch

from ensemble.inference.features import FeaturePool
from ensemble.inference.mirroring import Flip, all_flips, flipped_dims
from ensemble.inference.session import Session, TappedSession
from ensemble.inference.tiling import NNUNET, Blending, Shape, Tiling
from ensemble.types import ProgressCallback, ignore_progress


class Averaging(Enum):
    """Whether logits or probabilities are averaged over networks, flips and overlapping windows."""

    LOGITS = "logits"
    """As nnU-Net version 2."""
    PROBABILITIES = "probabilities"
    """Softmax over the classes, as nnU-Net version 1 and MONAI-style pipelines."""


class MirrorMode(Enum):
    """Which mirrored passes are made (test-time augmentation)."""

    MIRROR = "mirror"
    """All of them."""
    NONE = "none"
    """Only the unmirrored one."""
    GATED = "gated"
    """All of them in windows where the unmirrored pass leaves a doubt; see `SlidingWindowConfig.certainty`."""


class NonFiniteLogits(ArithmeticError):
    """A network returned infinite or undefined logits, so there is no prediction."""


@dataclass(frozen=True)
class SlidingWindowConfig:
    """How an image is cut into windows, and how network outputs are combined."""

    window: Shape
    """Voxels of a window along z, y, x; 1 along z for 2-D networks."""
    mirror_axes: tuple[int, ...] = ()
    """Spatial axes (0 z, 1 y, 2 x) along which mirrored images look alike to the networks."""
    tta: MirrorMode = MirrorMode.MIRROR
    """Which mirrored passes are made (test-time augmentation)."""
    average: Averaging = Averaging.LOGITS
    """What is averaged."""
    blending: Blending = NNUNET
    """The positions of the windows and the weights of their voxels."""
    batch_size: int = 1
    """Windows that go through a network together; changes speed and memory, not results (beyond rounding)."""
    certainty: float = 0.9
    """With gated TTA a window is certain, and not mirrored, when the unmirrored pass gives each of its voxels one class with at
    least this softmax probability. The edge of an object is never that sharp: windows without one are spared. Chosen on simulated
    cases (`benchmarks/agreement.py`): of windows above 0.8 mirroring changed no voxel."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size} is below 1")

    @property
    def flips(self) -> list[Flip]:
        """The possible passes over a window, the unmirrored one first."""
        return all_flips(() if self.tta is MirrorMode.NONE else self.mirror_axes)


@torch.inference_mode()
def sliding_window_inference(
    image: torch.Tensor,
    networks: Sequence[Session],
    config: SlidingWindowConfig,
    progress: ProgressCallback = ignore_progress,
    pool: FeaturePool | None = None,
) -> torch.Tensor:
    """Return the mean output of the networks for a whole image.

    Args:
        image: (C, Z, Y, X) float32. Windows are cut and answers collected on its device; each Session moves what it needs. Where that
            device runs out of memory, the work starts again with image and answers on the CPU.
        networks: folds or other networks of the same input and classes; every window goes through all of them.
        config: windows, mirroring and averaging.
        progress: called after each pass of a batch; a mirrored window counts as a window of its own, a spared one as done.
        pool: collects the layer's maps that the first network (a `TappedSession`) returns in the unmirrored pass.

    Returns:
        (K, Z, Y, X) float32 on the image's device: logits, or probabilities where those are averaged. Apart from the image, this and one
        channel of weights are the only arrays of its size that are held.

    Raises:
        NonFiniteLogits: a network gave infinite or undefined values.
        torch.OutOfMemoryError: a single window does not fit.
    """
    if not networks:
        raise ValueError("no networks to predict with")
    try:
        return _inference(image, networks, config, progress, pool)
    except torch.OutOfMemoryError:
        if image.device.type == "cpu":
            raise
        torch.cuda.empty_cache()
        return _inference(image.cpu(), networks, config, progress, pool).to(image.device)


def _inference(
    image: torch.Tensor,
    networks: Sequence[Session],
    config: SlidingWindowConfig,
    progress: ProgressCallback,
    pool: FeaturePool | None,
) -> torch.Tensor:
    if pool is not None:
        pool.clear()
    _, z, y, x = image.shape
    tiling = Tiling((z, y, x), config.window, config.blending)
    padded = _padded(image, tiling)
    importance = torch.from_numpy(config.blending.weights(config.window)).to(image.device)
    weights = torch.zeros(tiling.padded, device=image.device)
    windows = tiling.windows()
    passes = _Passes(len(windows) * len(config.flips), progress)
    runner = _Runner(networks, config, pool)
    total: torch.Tensor | None = None
    for batch in _batches(padded, windows, config.batch_size):
        answers = _answers(torch.stack([padded[:, *window] for window in batch.distinct]), runner, config, passes)
        answers.mul_(importance)
        if total is None:
            total = torch.zeros((answers.shape[1], *tiling.padded), device=image.device)
        for window, answer in batch.pairs(answers):
            total[:, *window] += answer
            weights[window] += importance
        passes.add((len(batch.windows) - len(batch.distinct)) * len(config.flips))
    assert total is not None  # there is at least one window
    return total.div_(weights)[:, *tiling.inside]


Window = tuple[slice, slice, slice]


@dataclass(frozen=True)
class _Batch:
    """Windows that are computed together."""

    windows: list[Window]
    alike: bool = False
    """Whether all windows are equal, so that the first one's output is valid for all."""

    @property
    def distinct(self) -> list[Window]:
        return self.windows[:1] if self.alike else self.windows

    def pairs(self, answers: torch.Tensor) -> Iterator[tuple[Window, torch.Tensor]]:
        return zip(self.windows, answers.expand(len(self.windows), *answers.shape[1:]), strict=True)


def _batches(padded: torch.Tensor, windows: list[Window], size: int) -> Iterator[_Batch]:
    """Yield all windows in batches; windows in which everything is zero are computed once."""
    filled: list[Window] = []
    empty: list[Window] = []
    for window in windows:
        (filled if padded[:, *window].any() else empty).append(window)
    for first in range(0, len(filled), size):
        yield _Batch(filled[first : first + size])
    if empty:
        yield _Batch(empty, alike=True)


def _padded(image: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Return the image padded with zeros; itself if it needs none."""
    if tiling.padded == tiling.image:
        return image
    return torch.nn.functional.pad(image, [n for pair in reversed(tiling.padding) for n in pair])


def _answers(windows: torch.Tensor, runner: _Runner, config: SlidingWindowConfig, passes: _Passes) -> torch.Tensor:
    """Return the mean over networks and flips (N, K, Z, Y, X) for a batch of windows (N, C, Z, Y, X)."""
    plain, *flips = config.flips
    first = runner(windows, [plain])
    passes.add(len(windows))
    doubtful = (
        _uncertain(first, config)
        if config.tta is MirrorMode.GATED
        else torch.arange(len(windows), device=windows.device)
    )
    passes.add(len(flips) * (len(windows) - len(doubtful)))
    if not flips or len(doubtful) == 0:
        return first
    inputs, total = windows[doubtful], first[doubtful]
    at_once = max(1, config.batch_size // len(inputs))
    for start in range(0, len(flips), at_once):
        together = flips[start : start + at_once]
        total += runner(inputs, together)
        passes.add(len(doubtful) * len(together))
    first[doubtful] = total / (len(flips) + 1)
    return first


class _Runner:
    """The networks, and the largest batch so far that fitted into memory."""

    def __init__(self, networks: Sequence[Session], config: SlidingWindowConfig, pool: FeaturePool | None) -> None:
        self._networks, self._average, self._most, self._pool = networks, config.average, config.batch_size, pool

    def __call__(self, windows: torch.Tensor, flips: Sequence[Flip]) -> torch.Tensor:
        """Sum over flips of the networks' mean answers (N, K, Z, Y, X) to windows (N, C, Z, Y, X), mirrored back."""
        dims = [flipped_dims(flip) for flip in flips]
        pool = None if any(dims) else self._pool
        answers = self._mean(torch.cat([windows.flip(d) if d else windows for d in dims]), pool)
        back = [part.flip(d) if d else part for part, d in zip(answers.split(len(windows)), dims, strict=True)]
        return reduce(torch.add, back)

    def _mean(self, windows: torch.Tensor, pool: FeaturePool | None) -> torch.Tensor:
        """Return the mean output of the networks; a batch that runs out of memory is halved, and so are all later ones."""
        parts: list[torch.Tensor] = []
        first = 0
        while first < len(windows):
            part = windows[first : first + self._most]
            try:
                leader, *others = self._networks
                logits, maps = (leader(part), None) if pool is None else cast(TappedSession, leader).tapped(part)
                answers = [_averaged(logits, self._average), *(_averaged(n(part), self._average) for n in others)]
                parts.append(reduce(torch.add, answers) / len(answers))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._most = len(part) // 2
                torch.cuda.empty_cache()  # does nothing without a GPU
                continue
            if pool is not None and maps is not None:  # the answers are there: nothing of them may be tried again
                pool.add(part, logits, maps)
            first += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _averaged(logits: torch.Tensor, average: Averaging) -> torch.Tensor:
    """Return what is averaged of one network's output. Raises NonFiniteLogits."""
    if not torch.isfinite(logits).all():
        raise NonFiniteLogits(
            "a network's output is not finite: broken weights, or values out of range of its precision"
        )
    return logits.softmax(1) if average is Averaging.PROBABILITIES else logits


def _uncertain(answers: torch.Tensor, config: SlidingWindowConfig) -> torch.Tensor:
    """Return the indices of windows (N, K, Z, Y, X) in which some voxel's likeliest class has a probability below `config.certainty`."""
    probabilities = answers if config.average is Averaging.PROBABILITIES else answers.softmax(1)
    likeliest = probabilities.amax(1).flatten(1)
    return (likeliest.amin(1) < config.certainty).nonzero().flatten()


class _Passes:
    """Counts windows that went through the networks, mirrored ones included."""

    def __init__(self, total: int, progress: ProgressCallback) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, count: int) -> None:
        if count:
            self._done += count
            self._progress(self._done, self._total)
