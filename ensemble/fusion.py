"""Fuse the members' lesion probabilities into one mask. Pure functions on arrays of one grid. The members' order has no effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from ensemble.config import FusionMethod
from ensemble.metrics import lesion_components
from ensemble.types import BoolArray, FloatArray
from ensemble.volume import Volume


@dataclass(frozen=True)
class FusedPrediction:
    """The joint result of the members that voted."""

    mask: Volume
    """bool: the lesion."""
    mean: Volume
    """float32, mean lesion probability of the voters."""
    votes: Volume
    """uint8, the agreement map: how many voters have p > 0.5 in each voxel."""
    voters: tuple[str, ...]
    dropped_components: int = 0
    """Number of small lesions that were left out of the mask because in no voxel of them all voters agree."""


def fuse(probabilities: Mapping[str, Volume], method: FusionMethod, min_disputed_ml: float = 0.0) -> FusedPrediction:
    """Fuse the members' lesion probabilities (float32 in 0..1, all on one grid) into one mask.

    A lesion smaller than `min_disputed_ml` (ml) stays in the mask only if all voters agree in one of its voxels.

    Raises ValueError when there are no probabilities, or when they lie on different grids.
    """
    if not probabilities:
        raise ValueError("nothing to fuse")
    voters = tuple(sorted(probabilities))
    volumes = [probabilities[name] for name in voters]
    if any(volume.grid != volumes[0].grid for volume in volumes):
        raise ValueError("members' probabilities lie on different grids")
    mean = np.asarray(np.mean([volume.array for volume in volumes], axis=0, dtype=np.float32))
    ballots = np.stack([volume.array > 0.5 for volume in volumes])
    votes = ballots.sum(axis=0, dtype=np.uint8)
    like, grid = volumes[0].like, volumes[0].grid
    mask, dropped = drop_small_disputed_components(
        _mask(ballots, votes, mean, method), ballots, min_disputed_ml / grid.voxel_ml
    )
    return FusedPrediction(like(mask), like(mean), like(votes), voters, dropped)


def _mask(ballots: BoolArray, votes: FloatArray, mean: FloatArray, method: FusionMethod) -> BoolArray:
    match method:
        case "majority":
            return majority(votes, len(ballots), mean)
        case "mean":
            return np.asarray(mean > 0.5)
        case "staple":
            return staple(ballots)
        case _:
            assert_never(method)


def drop_small_disputed_components(mask: BoolArray, ballots: BoolArray, min_voxels: float) -> tuple[BoolArray, int]:
    """Remove small components in which the voters nowhere all agree from the mask (z, y, x).

    Components are 26-connected. Those of fewer than `min_voxels` voxels go, unless all `ballots` (voters, z, y, x) are true in one of
    theirs. Returns the mask, and how many components went.
    """
    labels, _ = lesion_components(mask)
    small = np.bincount(labels.ravel()) < min_voxels
    small[labels[ballots.all(axis=0)]] = False
    small[0] = False
    return np.asarray(mask & ~small[labels]), int(small.sum())


def majority(votes: FloatArray, voters: int, mean: FloatArray) -> BoolArray:
    """Return where more than half of the voters agree; a tie is settled by the mean probability."""
    twice = 2 * votes.astype(np.int32)
    return np.asarray((twice > voters) | ((twice == voters) & (mean > 0.5)))


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
