"""Array resampling against nnunetv2's own functions, and volumes against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.geometry import Grid
from ensemble.resample import NnunetResampling, resample_volume
from ensemble.volume import Volume

OBLIQUE = (1.0, 0.0, 0.0, 0.0, 0.8, -0.6, 0.0, 0.6, 0.8)
ISOTROPIC = ((2.0, 2.0, 2.0), (1.7, 2.4, 1.9))
THICK = ((6.0, 1.8, 1.8), (5.0, 1.5, 1.5))

#: name -> (plans' function and options, spacing before and after, new shape)
PARITY = {
    "cubic": ("resample_data_or_seg_to_shape", {"order": 3, "force_separate_z": None}, ISOTROPIC, (13, 20, 17)),
    "linear, larger and smaller": ("resample_data_or_seg_to_shape", {"order": 1}, ISOTROPIC, (25, 9, 31)),
    "nearest": ("resample_data_or_seg_to_shape", {"order": 0}, ISOTROPIC, (25, 9, 31)),
    "separate z": ("resample_data_or_seg_to_shape", {"order": 3, "force_separate_z": None}, THICK, (14, 21, 19)),
    "separate z, linear": (
        "resample_data_or_seg_to_shape",
        {"order": 1, "order_z": 1, "force_separate_z": None},
        THICK,
        (7, 21, 19),
    ),
    "separate y": (
        "resample_data_or_seg_to_shape",
        {"order": 3, "force_separate_z": None},
        ((1.8, 6.0, 1.8), (1.5, 5.0, 1.5)),
        (14, 21, 19),
    ),
    "separate x, by the target": (
        "resample_data_or_seg_to_shape",
        {"order": 3, "force_separate_z": None},
        ((2.0, 2.0, 3.0), (1.0, 1.0, 5.0)),
        (24, 32, 9),
    ),
    "forced": ("resample_data_or_seg_to_shape", {"order": 3, "force_separate_z": True}, ISOTROPIC[::-1], (14, 9, 19)),
    "not forced where all spacings are equal": (
        "resample_data_or_seg_to_shape",
        {"order": 3, "force_separate_z": True},
        ISOTROPIC,
        (14, 9, 19),
    ),
    "thin slices are not separated": (
        "resample_data_or_seg_to_shape",
        {"order": 3, "force_separate_z": None},
        ((0.3, 1.2, 1.2), (0.4, 1.2, 1.2)),
        (9, 16, 15),
    ),
    "another threshold": (
        "resample_data_or_seg_to_shape",
        {"order": 3, "force_separate_z": None, "separate_z_anisotropy_threshold": 1.2},
        ISOTROPIC,
        (13, 20, 17),
    ),
    "torch": ("resample_torch_fornnunet", {"force_separate_z": False, "num_threads": 1}, ISOTROPIC, (13, 20, 17)),
    "torch, separate z": ("resample_torch_fornnunet", {"num_threads": 1}, THICK, (14, 21, 19)),
    "nothing to do": ("resample_data_or_seg_to_shape", {"order": 3}, ISOTROPIC, (12, 16, 15)),
    "turned off": ("no_resampling_hack", {}, ISOTROPIC, (5, 5, 5)),
}


@pytest.mark.parametrize("name", PARITY)
def test_same_as_nnunet(name):
    from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name

    function, options, (spacing, new_spacing), shape = PARITY[name]
    array = np.random.default_rng(0).normal(size=(2, 12, 16, 15)).astype(np.float32)
    expected = recursive_find_resampling_fn_by_name(function)(array, shape, spacing, new_spacing, **options)
    before = array.copy()
    result = NnunetResampling.from_plans(function, options).resize(array, shape, spacing, new_spacing)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=2e-5)
    np.testing.assert_array_equal(array, before)


@given(
    samples=st.integers(1, 60),
    length=st.integers(1, 60),
    order=st.sampled_from([0, 1, 3]),
    axis=st.integers(0, 2),
)
def test_constants_stay_and_nothing_overshoots(samples, length, order, axis):
    shape, target = [3, 3, 3], [3, 3, 3]
    shape[axis], target[axis] = samples, length
    how = NnunetResampling(order=order, force_separate_z=False)
    constant = how.resize(np.full((1, *shape), 5, np.float32), target, (1, 1, 1), (1, 1, 1))
    np.testing.assert_allclose(constant, 5, rtol=1e-5)
    noise = np.random.default_rng(samples).normal(size=(1, *shape)).astype(np.float32)
    resized = how.resize(noise, target, (1, 1, 1), (1, 1, 1))
    assert resized.shape == (1, *target)
    assert noise.min() - 1e-5 <= resized.min()
    assert resized.max() <= noise.max() + 1e-5


@pytest.mark.parametrize(
    ("function", "options", "complaint"),
    [
        ("resample_with_magic", {}, "unknown resampling function"),
        ("resample_data_or_seg_to_shape", {"magic": 1}, "unknown option 'magic'"),
        ("resample_torch_fornnunet", {"mode": "area"}, "mode is 'area'"),
    ],
)
def test_what_nnunet_does_not_have_is_refused(function, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        NnunetResampling.from_plans(function, options)


def ramp(grid: Grid) -> Volume:
    """A volume whose value is a linear function of world position."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.size], indexing="ij"), -1)
    world = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return Volume((world @ [0.5, -1.0, 2.0]).T.astype(np.float32), grid)


def test_volume_is_resampled_through_physical_space():
    source = Grid((20, 18, 16), (2.0, 1.5, 3.0), (-10.0, 4.0, 7.0), OBLIQUE)
    # inside the source, at another spacing and size
    target = Grid((8, 9, 10), (1.1, 1.3, 1.7), tuple((source.affine @ [5, 5, 5, 1])[:3]), OBLIQUE)
    np.testing.assert_allclose(resample_volume(ramp(source), target).array, ramp(target).array, atol=1e-3)


def test_volume_is_zero_where_it_has_no_data():
    source = Grid((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    shifted = Grid((4, 4, 4), (1.0, 1.0, 1.0), (2.0, 0.0, 0.0), source.direction)
    result = resample_volume(Volume(np.ones((4, 4, 4), np.float32), source), shifted)
    np.testing.assert_array_equal(result.array[0, 0], [1, 1, 0, 0])
    assert result.grid == shifted


def test_labels_keep_their_type_and_values():
    source = Grid((6, 6, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    fine = Grid((11, 11, 11), (0.5, 0.5, 0.5), source.origin_mm, source.direction)
    labels = np.random.default_rng(0).integers(0, 5, (6, 6, 6)).astype(np.uint8)
    result = resample_volume(Volume(labels, source), fine, linear=False)
    assert result.array.dtype == np.uint8
    np.testing.assert_array_equal(result.array[::2, ::2, ::2], labels)
    mask = resample_volume(Volume(labels > 2, source), fine, linear=False)
    np.testing.assert_array_equal(mask.array[::2, ::2, ::2], labels > 2)
