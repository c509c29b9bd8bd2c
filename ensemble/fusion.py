"""Fuse the members' lesion probabilities into one mask. Pure functions on arrays of one grid; the order of members has no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from ensemble.config import FusionMethod
from ensemble.metrics import lesion_components
from ensemble.types import AnyArray, BoolArray, FloatArray
from ensemble.volume import Volume

#: Shares of the total weight that differ by less are equal.
_ROUNDING = 1e-9
#: Mean probability that a lesion must reach in some voxel if it is below this volume (ml), and if it is larger (docs/adr/0015).
TINY_ML, TINY_PEAK, PEAK = 0.1, 0.6, 0.8


@dataclass(frozen=True)
class FusedPrediction:
    """The fused result of the members that voted."""

    mask: Volume
    """bool: the lesion."""
    mean: Volume
    """float32, mean lesion probability of the voters, by their weights."""
    votes: Volume
    """uint8, the agreement map: how many voters have p > 0.5 in each voxel."""
    voters: tuple[str, ...]
    dropped_components: int = 0
    """Number of small lesions that were left out of the mask because the voters' mean probability is too low in all their voxels."""
    small: int = 0
    """Number of lesions that were left out of the mask because they were smaller than any that count."""


def fuse(
    probabilities: Mapping[str, Volume],
    method: FusionMethod,
    min_disputed_ml: float = 0.0,
    *,
    weights: Mapping[str, float] | None = None,
    min_lesion_ml: float = 0.0,
) -> FusedPrediction:
    """Fuse the members' lesion probabilities (float32 in 0..1, all on one grid) into one mask.

    Lesions smaller than `min_lesion_ml` (ml) are removed. Of several voters, a lesion smaller than `min_disputed_ml` (ml) stays only if
    the mean probability reaches `PEAK` in one of its voxels (`TINY_PEAK` if it is smaller than `TINY_ML`). A voter that `weights` does not
    name has weight 1; STAPLE estimates its own weights.

    Raises ValueError when there are no probabilities, or when they lie on different grids.
    """
    if not probabilities:
        raise ValueError("nothing to fuse")
    voters = tuple(sorted(probabilities))
    volumes = [probabilities[name] for name in voters]
    if any(volume.grid != volumes[0].grid for volume in volumes):
        raise ValueError("members' probabilities lie on different grids")
    weight = [(weights or {}).get(name, 1.0) for name in voters]
    mean = mean_probability([volume.array for volume in volumes], weight)
    ballots = np.stack([volume.array > 0.5 for volume in volumes])
    votes = ballots.sum(axis=0, dtype=np.uint8)
    like, grid = volumes[0].like, volumes[0].grid
    whole, small = drop_small_components(_mask(ballots, weight, mean, method), min_lesion_ml / grid.voxel_ml)
    disputable = min_disputed_ml if len(voters) > 1 else 0.0  # one voter has no other to disagree with
    mask, dropped = drop_disputed_components(whole, mean, grid.voxel_ml, disputable)
    return FusedPrediction(like(mask), like(mean), like(votes), voters, dropped, small)


def mean_probability(probabilities: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
    """Return the voters' weighted mean probability (float32)."""
    if len(set(weights)) == 1:
        return np.asarray(np.mean(probabilities, axis=0, dtype=np.float32))
    shares = np.asarray(weights, np.float32) / np.float32(sum(weights))
    total = np.zeros(probabilities[0].shape, np.float32)
    for share, probability in zip(shares, probabilities, strict=True):
        total += share * probability
    return total


def _mask(ballots: BoolArray, weights: Sequence[float], mean: FloatArray, method: FusionMethod) -> BoolArray:
    match method:
        case "majority":
            return majority_vote(ballots, weights, mean)
        case "mean":
            return np.asarray(mean > 0.5)
        case "staple":
            return staple(ballots)
        case _:
            assert_never(method)


def drop_small_components(mask: BoolArray, min_voxels: float) -> tuple[BoolArray, int]:
    """Return the mask (z, y, x) without 26-connected components smaller than `min_voxels`, and how many were removed."""
    if min_voxels <= 1:
        return mask, 0
    labels, _ = lesion_components(mask)
    return _without(mask, labels, np.bincount(labels.ravel()) < min_voxels)


def drop_disputed_components(
    mask: BoolArray,
    mean: FloatArray,
    voxel_ml: float,
    max_ml: float,
    *,
    tiny_peak: float = TINY_PEAK,
    peak: float = PEAK,
) -> tuple[BoolArray, int]:
    """Return the mask without the small components of which no voxel is sure, and how many were removed.

    Args:
        mask: (z, y, x).
        mean: the voters' mean probability (z, y, x).
        voxel_ml: volume of a voxel, ml.
        max_ml: only 26-connected components smaller than this volume (ml) are removed: those whose highest mean probability is below
            `peak`, or below `tiny_peak` if they are smaller than `TINY_ML`.
        tiny_peak: mean probability.
        peak: mean probability.
    """
    labels, count = lesion_components(mask) if max_ml > voxel_ml else (mask, 0)
    if count == 0:
        return mask, 0
    volume_ml = np.bincount(labels.ravel(), minlength=count + 1) * voxel_ml
    highest = np.zeros(count + 1, np.float32)
    np.maximum.at(highest, labels[mask], mean[mask])
    doubtful = highest < np.where(volume_ml < TINY_ML, tiny_peak, peak)
    return _without(mask, labels, doubtful & (volume_ml < max_ml))


def _without(mask: BoolArray, labels: AnyArray, removed: BoolArray) -> tuple[BoolArray, int]:
    """Return the mask without the components whose `labels` are `removed` (one value a label, the background's first), and their number."""
    removed[0] = False
    return np.asarray(mask & ~removed[labels]), int(removed.sum())


def majority_vote(ballots: BoolArray, weights: Sequence[float], mean: FloatArray) -> BoolArray:
    """Return where the voters for lesion hold more than half of the total weight; the mean probability breaks ties.

    Args:
        ballots: bool (voters, ...).
        weights: one a voter, above 0.
        mean: the voters' mean probability (...).
    """
    if len(set(weights)) == 1:  # whole numbers, so that no rounding decides
        twice, total = 2 * ballots.sum(axis=0, dtype=np.int32), len(ballots)
        return np.asarray((twice > total) | ((twice == total) & (mean > 0.5)))
    share = np.tensordot(np.asarray(weights) / sum(weights), ballots, axes=1)
    tie = np.abs(share - 0.5) < _ROUNDING
    return np.asarray(((share > 0.5) & ~tie) | (tie & (mean > 0.5)))


def staple(ballots: BoolArray, *, iterations: int = 100, tolerance: float = 1e-8) -> BoolArray:
    """Fuse by STAPLE (Warfield et al., IEEE TMI 2004).

    Weigh each voter by its sensitivity and specificity, found by expectation maximisation.

    `ballots` is (voters, ...). Voxels with the same ballots share a posterior, so the estimation runs over the at most 2^voters
    patterns that occur, with exact counts, instead of over voxels. The prior is the voters' mean lesion fraction.
    """
    voters = len(ballots)
    bits = np.tensordot(1 << np.arange(voters), ballots.astype(np.int64), axes=1)
    patterns, where, counts = np.unique(bits, return_inverse=True, return_counts=True)
    yes = (patterns[:, None] >> np.arange(voters) & 1).astype(bool)  # (patterns, voters)
    prior = float((yes.mean(axis=1) * counts).sum() / counts.sum())
    if prior in (0.0, 1.0) or voters == 1:
        return np.asarray(2 * ballots.sum(axis=0) > voters)
    sensitivity, specificity = np.full(voters, 0.99999), np.full(voters, 0.99999)
    posterior = np.zeros(len(patterns))
    for _ in range(iterations):
        lesion = prior * np.where(yes, sensitivity, 1 - sensitivity).prod(axis=1)
        healthy = (1 - prior) * np.where(yes, 1 - specificity, specificity).prod(axis=1)
        updated = lesion / np.maximum(lesion + healthy, np.finfo(float).tiny)
        weight_lesion, weight_healthy = updated * counts, (1 - updated) * counts
        sensitivity = (weight_lesion[:, None] * yes).sum(axis=0) / weight_lesion.sum()
        specificity = (weight_healthy[:, None] * ~yes).sum(axis=0) / weight_healthy.sum()
        settled, posterior = np.abs(updated - posterior).max() < tolerance, updated
        if settled:
            break
    return np.asarray((posterior > 0.5)[where].reshape(ballots.shape[1:]))
