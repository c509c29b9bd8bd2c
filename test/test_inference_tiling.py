"""Tiling and importance: complete cover, nnU-Net's own starts, weights that are never zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.inference.mirroring import all_flips
from ensemble.inference.tiling import Tiling, axis_starts, gaussian_importance

shapes = st.tuples(*[st.integers(1, 40)] * 3)
windows = st.tuples(*[st.integers(1, 24)] * 3)
steps = st.floats(0.1, 1.0)


@given(image=shapes, window=windows, step=steps)
def test_every_voxel_is_covered_and_no_window_leaves_the_image(image, window, step):
    tiling = Tiling(image, window, step)
    for axis, (length, size) in enumerate(zip(tiling.padded, window, strict=True)):
        starts = axis_starts(length, size, step)
        assert starts[0] == 0
        assert starts[-1] == length - size
        assert all(0 < after - before <= size for before, after in zip(starts, starts[1:], strict=False)), axis
    assert len(set(map(str, tiling.windows()))) == len(tiling.windows())


@given(image=shapes, window=windows)
def test_padding_is_centred_and_undone(image, window):
    tiling = Tiling(image, window)
    original = np.random.default_rng(0).normal(size=image)
    padded = np.pad(original, tiling.padding)
    assert padded.shape == tiling.padded
    assert all(0 <= after - before <= 1 for before, after in tiling.padding)
    np.testing.assert_array_equal(padded[tiling.inside], original)


@pytest.mark.parametrize(
    ("length", "window", "step", "expected"),
    [
        (110, 64, 0.5, [0, 23, 46]),  # nnU-Net's own example
        (64, 64, 0.5, [0]),
        (65, 64, 0.5, [0, 1]),
        (5, 1, 0.5, [0, 1, 2, 3, 4]),  # slices of a 2-D network
        (73, 48, 0.5, [0, 12, 25]),
        (10, 4, 1.0, [0, 3, 6]),
    ],
)
def test_starts(length, window, step, expected):
    assert axis_starts(length, window, step) == expected


def test_starts_and_importance_are_those_of_nnunet():
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    for image, window in (((73, 95, 79), (48, 64, 64)), ((30, 30, 30), (30, 16, 8)), ((41, 33, 100), (7, 32, 96))):
        theirs = compute_steps_for_sliding_window(image, window, 0.5)
        assert [axis_starts(n, size, 0.5) for n, size in zip(image, window, strict=True)] == theirs
        weights = compute_gaussian(window, dtype=torch.float32, device=torch.device("cpu")).numpy()
        np.testing.assert_allclose(gaussian_importance(window), weights, rtol=1e-4, atol=1e-12)


@given(window=windows)
def test_importance_is_positive_and_at_most_one(window):
    weights = gaussian_importance(window)
    assert weights.shape == window
    assert weights.dtype == np.float32
    assert weights.min() > 0
    assert weights.max() == 1


@pytest.mark.parametrize(("image", "window", "step"), [((4, 4, 4), (2, 2, 2), 0.0), ((0, 4, 4), (2, 2, 2), 0.5)])
def test_impossible_tilings_are_refused(image, window, step):
    with pytest.raises(ValueError, match="step|empty"):
        Tiling(image, window, step)


def test_flips_are_all_subsets_and_the_plain_image_comes_first():
    assert all_flips((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(all_flips((0, 1, 2))) == 8
    assert all_flips(()) == [()]
    with pytest.raises(ValueError, match="axes"):
        all_flips((0, 3))
