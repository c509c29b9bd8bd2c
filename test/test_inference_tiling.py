"""Tiling and importance: complete cover, nnU-Net's own starts, weights that are never zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.inference.mirroring import all_flips
from ensemble.inference.tiling import Blending, Tiling, TilingConvention, gaussian_importance, window_starts

shapes = st.tuples(*[st.integers(1, 40)] * 3)
windows = st.tuples(*[st.integers(1, 24)] * 3)
steps = st.floats(0.1, 1.0)


@given(image=shapes, window=windows, step=steps, convention=st.sampled_from(TilingConvention))
def test_every_voxel_is_covered_and_no_window_leaves_the_image(image, window, step, convention):
    blending = Blending(step, convention=convention)
    tiling = Tiling(image, window, blending)
    for axis, (length, size) in enumerate(zip(tiling.padded, window, strict=True)):
        starts = blending.starts(length, size)
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
    assert window_starts(length, window, step) == expected


def test_starts_and_importance_are_those_of_nnunet():
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    for image, window in (((73, 95, 79), (48, 64, 64)), ((30, 30, 30), (30, 16, 8)), ((41, 33, 100), (7, 32, 96))):
        theirs = compute_steps_for_sliding_window(image, window, 0.5)
        assert [window_starts(n, size, 0.5) for n, size in zip(image, window, strict=True)] == theirs
        weights = compute_gaussian(window, dtype=torch.float32, device=torch.device("cpu")).numpy()
        np.testing.assert_allclose(gaussian_importance(window), weights, rtol=1e-4, atol=1e-12)


def test_starts_and_weights_are_those_of_monai():
    """NVAUTO's and SWAN's."""
    import torch

    monai, layers = pytest.importorskip("monai.data.utils"), pytest.importorskip("monai.networks.layers")
    for image, window, overlap in (
        ((223, 223, 145), (192, 192, 128), 0.625),
        ((192, 200, 128), (192, 192, 128), 0.625),
        ((112, 113, 73), (64, 64, 64), 0.5),
        ((30, 31, 9), (7, 16, 9), 0.3),
    ):
        blending = Blending(1 - overlap, convention=TilingConvention.MONAI)
        steps = [n if n == size else int(n * (1 - overlap)) for n, size in zip(window, image, strict=True)]
        theirs = monai.dense_patch_slices(image, window, steps)
        assert Tiling(image, window, blending).windows() == [tuple(place) for place in theirs]
    for window in ((24, 16, 9), (7, 40, 1)):
        peak = torch.zeros(1, 1, *window)
        peak[0, 0, *(n // 2 for n in window)] = 1
        theirs = layers.GaussianFilter(3, [n / 8 for n in window])(peak)[0, 0]  # as version 0.9 makes its map
        theirs /= theirs.max()
        ours = Blending(convention=TilingConvention.MONAI).weights(window)
        np.testing.assert_allclose(ours, theirs.clamp(min=1e-3).numpy(), rtol=1e-4)
    assert (Blending(sigma=None).weights((4, 5, 6)) == 1).all()


@given(window=windows, convention=st.sampled_from(TilingConvention))
def test_importance_is_positive_and_at_most_one(window, convention):
    weights = Blending(convention=convention).weights(window)
    assert weights.shape == window
    assert weights.dtype == np.float32
    assert weights.min() > 0
    assert weights.max() == 1


@pytest.mark.parametrize(("image", "window", "step"), [((4, 4, 4), (2, 2, 2), 0.0), ((0, 4, 4), (2, 2, 2), 0.5)])
def test_impossible_tilings_are_refused(image, window, step):
    with pytest.raises(ValueError, match="step|empty"):
        Tiling(image, window, Blending(step))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_widths_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        Blending(sigma=sigma)


def test_flips_are_all_subsets_and_the_plain_image_comes_first():
    assert all_flips((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(all_flips((0, 1, 2))) == 8
    assert all_flips(()) == [()]
    with pytest.raises(ValueError, match="axes"):
        all_flips((0, 3))
