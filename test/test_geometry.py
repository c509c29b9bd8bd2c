"""Grids and lossless changes of axis order."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import GRID
from ensemble.geometry import Grid
from ensemble.volume import Volume, from_sitk, to_sitk

SIGNED_AXES = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def grid_with(order: tuple[int, ...], signs: tuple[int, ...], tilt: float = 0.0) -> Grid:
    """A grid whose index axis k runs along world axis order[k] in direction signs[k], tilted about all axes by `tilt` radians."""
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign
    c, s = np.cos(tilt), np.sin(tilt)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return Grid((4, 5, 6), (1.0, 2.0, 3.0), (10.0, -20.0, 30.0), tuple((turn @ matrix).ravel()))


def world_positions(grid: Grid) -> np.ndarray:
    """World position (z, y, x, 3) of every voxel."""
    z, y, x = np.indices(grid.shape_zyx)
    return np.stack([x, y, z], -1) @ grid.affine[:3, :3].T + grid.affine[:3, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "signs"), SIGNED_AXES)
@given(tilt=st.floats(-0.4, 0.4))
def test_canonical_orientation_follows_the_world_axes(
    order: tuple[int, ...], signs: tuple[int, ...], tilt: float
) -> None:
    grid = grid_with(order, signs, tilt)
    positions = np.moveaxis(grid.canonical().apply(np.moveaxis(world_positions(grid), -1, 0)), 0, -1)
    for axis, world in enumerate((2, 1, 0)):  # array axes (z, y, x) run along S, P, L
        step = np.diff(positions, axis=axis).reshape(-1, 3).mean(0)
        assert np.argmax(np.abs(step)) == world
        assert step[world] > 0


@pytest.mark.parametrize(("order", "signs"), SIGNED_AXES)
def test_canonical_orientation_is_undone_exactly(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    grid = grid_with(order, signs)
    array = np.random.default_rng(1).random((2, *grid.shape_zyx))
    change = grid.canonical()
    assert np.array_equal(change.undo(change.apply(array)), array)
    there = change.apply(array[0])
    extent = [n * mm for n, mm in zip(there.shape, change.spacing(grid.spacing_zyx_mm), strict=True)]
    assert extent == pytest.approx(
        [np.ptp([0, grid.size[k]]) * grid.spacing_mm[k] for k in (order.index(w) for w in (2, 1, 0))]
    )


@pytest.mark.parametrize(
    ("order", "signs", "letters"),
    [((0, 1, 2), (1, 1, 1), "LPS"), ((0, 1, 2), (-1, -1, 1), "RAS"), ((1, 2, 0), (1, -1, -1), "PIR")],
)
def test_axis_letters(order: tuple[int, ...], signs: tuple[int, ...], letters: str) -> None:
    assert "".join(grid_with(order, signs, 0.2).axis_letters) == letters


def test_distance_and_volume() -> None:
    moved = Grid(GRID.size, GRID.spacing_mm, (GRID.origin_mm[0] + 1.0, *GRID.origin_mm[1:]), GRID.direction)
    assert GRID.distance_voxels(moved) == pytest.approx(0.25)
    assert GRID.distance_voxels(GRID) == 0
    assert GRID.distance_voxels(Grid((1, 1, 1), GRID.spacing_mm, GRID.origin_mm, GRID.direction)) == float("inf")
    assert GRID.voxel_ml == pytest.approx(0.08)


def test_voxels_lie_where_itk_has_them() -> None:
    grid = grid_with((2, 0, 1), (1, -1, -1), tilt=0.2)
    image = to_sitk(Volume(np.zeros(grid.shape_zyx, np.float32), grid))
    index = np.array([[0, 0, 0], [5, 1, 2], [3, 4, 1]])
    expected = [image.TransformIndexToPhysicalPoint(one[::-1].tolist()) for one in index]
    np.testing.assert_allclose(grid.points_mm(index), expected)
    np.testing.assert_allclose(grid.points_mm(index[1]), expected[1])


def test_simpleitk_round_trip_keeps_every_voxel_and_the_grid() -> None:
    array = np.random.default_rng(2).random(GRID.shape_zyx).astype(np.float32)
    back = from_sitk(to_sitk(Volume(array, GRID)))
    assert back.grid == GRID
    assert np.array_equal(back.array, array)
    assert to_sitk(Volume(array, GRID))[3, 5, 7] == array[7, 5, 3]


def test_an_array_on_the_wrong_grid_is_a_bug() -> None:
    with pytest.raises(ValueError, match="on a grid of shape"):
        Volume(np.zeros((2, 2, 2)), GRID)
