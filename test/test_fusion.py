"""Votes become a mask."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from ensemble.config import FusionMethod
from ensemble.fusion import fuse, staple
from ensemble.geometry import Grid
from ensemble.volume import Volume

LINE = Grid((1, 1, 1), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


def one_voxel(*probabilities: float) -> dict[str, Volume]:
    return {f"member {k}": Volume(np.full((1, 1, 1), p, np.float32), LINE) for k, p in enumerate(probabilities)}


@pytest.mark.parametrize(
    ("probabilities", "majority", "mean"),
    [
        ((0.6,), True, True),
        ((0.5,), False, False),  # a vote is p > 0.5
        ((0.9, 0.2, 0.6), True, True),
        ((0.9, 0.2, 0.5), False, True),
        ((0.51, 0.51, 0.0), True, False),
        ((0.9, 0.2), True, True),  # tie: mean 0.55
        ((0.7, 0.2), False, False),  # tie: mean 0.45
        ((0.75, 0.25), False, False),  # tie: mean exactly 0.5
        ((0.9, 0.9, 0.1, 0.0), False, False),  # tie: mean 0.475
        ((0.9, 0.9, 0.3, 0.0), True, True),  # tie: mean 0.525
    ],
)
def test_rules(probabilities: tuple[float, ...], majority: bool, mean: bool) -> None:
    for method, expected in (("majority", majority), ("mean", mean)):
        fused = fuse(one_voxel(*probabilities), method)  # type: ignore[arg-type]
        assert bool(fused.mask.array[0, 0, 0]) is expected, method
        assert fused.votes.array[0, 0, 0] == sum(p > 0.5 for p in probabilities)
        assert fused.mean.array[0, 0, 0] == pytest.approx(np.mean(probabilities), abs=1e-6)


def random_members(seed: int, members: int) -> dict[str, Volume]:
    grid = Grid((7, 6, 5), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), LINE.direction)
    rng = np.random.default_rng(seed)
    truth = rng.random(grid.shape_zyx) < 0.3
    return {
        name: Volume(np.where(rng.random(truth.shape) < error, ~truth, truth).astype(np.float32) * 0.8, grid)
        for name, error in zip("abcd"[:members], (0.05, 0.15, 0.3, 0.2), strict=False)
    }


@given(seed=st.integers(0, 1000), method=st.sampled_from(["majority", "mean", "staple"]))
def test_the_order_of_members_does_not_matter(seed: int, method: FusionMethod) -> None:
    members = random_members(seed, 3)
    masks = [fuse({name: members[name] for name in order}, method).mask.array for order in permutations(members)]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("members", [2, 3, 4])
def test_staple_equals_itk(seed: int, members: int) -> None:
    ballots = np.stack([volume.array > 0.5 for volume in random_members(seed, members).values()])
    images = [sitk.GetImageFromArray(ballot.astype(np.uint8)) for ballot in ballots]
    itk = sitk.STAPLEImageFilter()
    itk.SetMaximumIterations(1000)
    reference = sitk.GetArrayFromImage(itk.Execute(images))
    decided = np.abs(reference - 0.5) > 1e-3
    assert np.array_equal(staple(ballots)[decided], (reference > 0.5)[decided])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("method", ["majority", "mean", "staple"])
def test_agreement_of_all_is_kept(value: float, method: FusionMethod) -> None:
    assert bool(fuse(one_voxel(value, value, value), method).mask.array.all()) is (value > 0.5)


def test_nothing_to_fuse_and_different_grids_are_bugs() -> None:
    with pytest.raises(ValueError, match="nothing"):
        fuse({}, "majority")
    elsewhere = Grid(LINE.size, LINE.spacing_mm, (5.0, 0.0, 0.0), LINE.direction)
    with pytest.raises(ValueError, match="different grids"):
        fuse(one_voxel(0.5) | {"far": Volume(np.zeros((1, 1, 1), np.float32), elsewhere)}, "majority")


def test_small_lesions_need_a_voxel_of_high_mean_probability() -> None:
    """Three voters, voxels of 0.05 ml: lesions of one, two, two and four voxels with peaks (means) of 0.63, 0.63, 0.87 and 0.63."""
    line = np.zeros((3, 1, 1, 14), np.float32)
    for lesion in (slice(0, 1), slice(2, 4), slice(5, 7), slice(9, 13)):
        line[:2, ..., lesion] = 0.95
    line[2, ..., 6] = 0.7
    grid = Grid((14, 1, 1), (5.0, 5.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    members = {str(number): Volume(array, grid) for number, array in enumerate(line)}

    def found(min_disputed_ml: float) -> tuple[list[int], int]:
        fused = fuse(members, "majority", min_disputed_ml)
        return np.flatnonzero(fused.mask.array).tolist(), fused.dropped_components

    everything = [0, 2, 3, 5, 6, 9, 10, 11, 12]
    assert found(0.0) == (everything, 0)
    assert found(0.1) == (everything, 0)  # below 0.1 ml the peak of 0.63 is enough
    assert found(0.15) == ([0, 5, 6, 9, 10, 11, 12], 1)
    assert found(9.0) == ([0, 5, 6], 2)
    line[:2, ..., 0] = 0.8  # a mean of 0.53
    assert found(0.1) == (everything[1:], 1)
    alone = fuse({"0": members["0"]}, "majority", 9.0)
    assert (int(alone.mask.array.sum()), alone.dropped_components) == (9, 0)  # one voter has no other to disagree with


def one_vote_each(*levels: float) -> dict[str, Volume]:
    """A voxel in which members a, b, ... say so."""
    return {
        name: Volume(np.full((1, 1, 1), level, np.float32), LINE_OF_ONE)
        for name, level in zip("abcd", levels, strict=False)
    }


LINE_OF_ONE = Grid((1, 1, 1), (10.0, 10.0, 10.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


@pytest.mark.parametrize(
    ("levels", "weights", "lesion"),
    [
        ((0.9, 0.1, 0.1), {"a": 3.0}, True),  # 3 of 5
        ((0.9, 0.1, 0.1), {"a": 1.9}, False),  # 1.9 of 3.9
        ((0.9, 0.4, 0.4), {"a": 2.0}, True),  # 2 of 4: the mean by weights, 0.65, decides
        ((0.6, 0.1, 0.1), {"a": 2.0}, False),  # 2 of 4: 0.35
        ((0.9, 0.9, 0.1), {"c": 2.0}, False),  # a tie, 0.5 on average
        ((0.9, 0.9, 0.1), {"c": 0.3}, True),
        ((0.9, 0.4), {"b": 0.5}, True),
        (
            (0.9, 0.1, 0.2),
            {"a": 0.3, "b": 0.1, "c": 0.2},
            True,
        ),  # 0.3 of 0.6 is half, whatever the rounding; mean 0.533
    ],
)
def test_votes_count_by_weight(levels: tuple[float, ...], weights: dict[str, float], lesion: bool) -> None:
    assert bool(fuse(one_vote_each(*levels), "majority", weights=weights).mask.array.item()) is lesion


def test_equal_weights_are_the_usual_rule_to_the_bit() -> None:
    draw = np.random.default_rng(0)
    grid = Grid((9, 8, 7), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    for number in (1, 2, 3, 4, 5):
        members = {str(n): Volume(draw.random(grid.shape_zyx, np.float32), grid) for n in range(number)}
        usual, same = fuse(members, "majority"), fuse(members, "majority", weights=dict.fromkeys(members, 0.7))
        assert np.array_equal(usual.mask.array, same.mask.array)
        assert np.array_equal(usual.mean.array, same.mean.array)


def test_lesions_that_are_too_small_are_left_out_whoever_agrees() -> None:
    line = np.zeros((1, 1, 12), np.float32)
    line[..., 0], line[..., 3:5], line[..., 7:10] = 0.9, 0.9, 0.9
    grid = Grid((12, 1, 1), (10.0, 10.0, 10.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    for least, kept, small in ((0.0, 6, 0), (1.0, 6, 0), (1.5, 5, 1), (2.5, 3, 2), (9.0, 0, 3)):
        fused = fuse({"a": Volume(line, grid)}, "majority", min_lesion_ml=least)
        assert (int(fused.mask.array.sum()), fused.small) == (kept, small)
