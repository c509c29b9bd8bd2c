"""The engine on networks whose answer is known: what goes in must come out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ensemble.inference.engine import (
    Averaging,
    MirrorMode,
    NonFiniteLogits,
    SlidingWindowConfig,
    sliding_window_inference,
)
from ensemble.inference.session_torch import TorchSession

SIZES = [
    pytest.param((20, 31, 17), (8, 12, 10), id="larger than the window"),
    pytest.param((5, 31, 7), (8, 12, 10), id="smaller in two axes"),
    pytest.param((5, 6, 7), (8, 12, 10), id="smaller in all axes"),
    pytest.param((6, 31, 17), (1, 12, 10), id="2-D"),
    pytest.param((6, 7, 31), (1, 12, 10), id="2-D, smaller in one axis"),
]
ALL_AXES = (0, 1, 2)


def image_of(shape: tuple[int, int, int], channels: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32))


def identity(windows: torch.Tensor) -> torch.Tensor:
    return windows


class Recording:
    """A network that counts the windows it sees."""

    def __init__(self, network=identity):
        self.network, self.windows, self.batches = network, 0, 0

    def __call__(self, windows):
        self.windows += len(windows)
        self.batches += 1
        return self.network(windows)


@pytest.mark.parametrize(("shape", "window"), SIZES)
@pytest.mark.parametrize("tta", list(MirrorMode))
def test_identity_network_gives_the_image_back(shape, window, tta):
    image = image_of(shape)
    before = image.clone()
    result = sliding_window_inference(image, [identity], SlidingWindowConfig(window, ALL_AXES, tta))
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, image, rtol=0, atol=2e-6)
    assert torch.equal(image, before), "the image was changed"


@pytest.mark.parametrize("average", list(Averaging))
def test_mirroring_changes_nothing_for_a_network_that_does_not_care(average):
    def pointwise(windows):
        return torch.stack([windows.sum(1), windows.prod(1)], 1)

    image, how = image_of((20, 18, 16)), SlidingWindowConfig((8, 8, 8), ALL_AXES, average=average)
    mirrored = sliding_window_inference(image, [pointwise], how)
    torch.testing.assert_close(
        mirrored, sliding_window_inference(image, [pointwise], replace(how, tta=MirrorMode.NONE)), rtol=0, atol=2e-6
    )


def test_mirroring_averages_a_network_that_looks_to_one_side():
    """A shift by one voxel along x and its mirror image average to the mean of both neighbours."""

    def shift(windows):
        return windows.roll(1, dims=4)

    image = image_of((8, 8, 8))
    result = sliding_window_inference(image, [shift], SlidingWindowConfig((8, 8, 8), (2,)))
    torch.testing.assert_close(result, (image.roll(1, 3) + image.roll(-1, 3)) / 2, rtol=0, atol=1e-6)
    along_y = sliding_window_inference(image, [shift], SlidingWindowConfig((8, 8, 8), (1,)))
    torch.testing.assert_close(along_y, image.roll(1, 3), rtol=0, atol=1e-6)


def test_probabilities_are_averaged_after_softmax_and_logits_before():
    image = torch.zeros(2, 4, 4, 4)
    constants = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, 4.0])]
    networks = [lambda w, c=c: c.view(1, 2, 1, 1, 1).expand(len(w), 2, 4, 4, 4).clone() for c in constants]
    how = SlidingWindowConfig((4, 4, 4))
    logits = sliding_window_inference(image, networks, how)
    torch.testing.assert_close(logits[:, 0, 0, 0], torch.tensor([0.0, 2.0]))
    probabilities = sliding_window_inference(image, networks, replace(how, average=Averaging.PROBABILITIES))
    expected = torch.stack([constant.softmax(0) for constant in constants]).mean(0)
    torch.testing.assert_close(probabilities[:, 0, 0, 0], expected)


def test_gated_is_mirror_where_nothing_is_certain_and_none_where_all_is():
    def sided(scale):
        def network(windows):
            margin = scale + windows.roll(1, dims=4).mean(1)
            return torch.stack([margin, -margin], 1)

        return network

    image, how = image_of((12, 12, 20)), SlidingWindowConfig((8, 8, 8), ALL_AXES)
    runs = {
        (scale, tta): (recording, sliding_window_inference(image, [recording], replace(how, tta=tta, batch_size=3)))
        for scale in (0.0, 50.0)
        for tta in MirrorMode
        for recording in [Recording(sided(scale))]
    }
    torch.testing.assert_close(runs[0.0, MirrorMode.GATED][1], runs[0.0, MirrorMode.MIRROR][1])
    torch.testing.assert_close(runs[50.0, MirrorMode.GATED][1], runs[50.0, MirrorMode.NONE][1])
    assert runs[50.0, MirrorMode.GATED][0].windows == runs[50.0, MirrorMode.NONE][0].windows
    assert runs[50.0, MirrorMode.MIRROR][0].windows == 8 * runs[50.0, MirrorMode.NONE][0].windows
    assert not torch.allclose(runs[0.0, MirrorMode.MIRROR][1], runs[0.0, MirrorMode.NONE][1]), (
        "the check could not fail"
    )


def test_gated_mirrors_only_the_doubtful_windows():
    """A doubt (logits near 0) in one corner: windows that hold it are mirrored, and only these."""
    image = torch.full((1, 8, 8, 40), 10.0)
    image[..., :2] = 0
    network = Recording(lambda windows: torch.cat([windows, -windows], 1))
    how = SlidingWindowConfig((8, 8, 8), (2,), MirrorMode.GATED, batch_size=2)
    sliding_window_inference(image, [network], how)
    assert network.windows == 9 + 1  # nine windows along x, one of them twice


@pytest.mark.slow
def test_results_do_not_depend_on_batch_size_or_threads():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(2, 8, 3, padding=1), torch.nn.InstanceNorm3d(8), torch.nn.ReLU(), torch.nn.Conv3d(8, 2, 1)
    )
    session, image = TorchSession(network, dims=3, device="cpu"), image_of((14, 16, 15))
    how = SlidingWindowConfig((10, 10, 10), ALL_AXES)
    single = sliding_window_inference(image, [session], how)
    threads = torch.get_num_threads()
    try:
        for batch_size, count in ((3, 1), (5, 2), (64, 2)):
            torch.set_num_threads(count)
            other = sliding_window_inference(image, [session], replace(how, batch_size=batch_size))
            torch.testing.assert_close(other, single, rtol=0, atol=2e-5)
    finally:
        torch.set_num_threads(threads)


def test_two_dimensional_networks_see_slices():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 3, 3, padding=1)
    image = image_of((5, 12, 10))
    result = sliding_window_inference(
        image, [TorchSession(network, dims=2, device="cpu")], SlidingWindowConfig((1, 12, 10), batch_size=2)
    )
    with torch.inference_mode():
        expected = network(image.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("tta", "fill", "expected"),
    [
        (MirrorMode.NONE, 0.1, [(3, 4), (4, 4)]),
        (MirrorMode.MIRROR, 0.1, [(3, 16), (6, 16), (9, 16), (12, 16), (13, 16), (16, 16)]),
        (MirrorMode.GATED, 0.1, [(3, 16), (6, 16), (9, 16), (12, 16), (13, 16), (16, 16)]),
        (MirrorMode.GATED, 9.0, [(3, 16), (12, 16), (13, 16), (16, 16)]),
    ],
)
def test_progress_counts_passes_up_to_all(tta, fill, expected):
    seen = []
    image = torch.full((1, 8, 8, 20), fill)
    how = SlidingWindowConfig((8, 8, 8), (1, 2), tta, batch_size=3)
    sliding_window_inference(
        image, [lambda windows: torch.cat([windows, -windows], 1)], how, lambda *at: seen.append(at)
    )
    assert seen == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("average", list(Averaging))
def test_values_that_are_no_numbers_are_an_error_not_a_mask(value, average):
    def broken(windows):
        logits = windows.clone()
        logits[0, 0, 1, 1, 1] = value
        return logits

    with pytest.raises(NonFiniteLogits):
        sliding_window_inference(image_of((8, 8, 8)), [broken], SlidingWindowConfig((8, 8, 8), average=average))


def test_the_sessions_own_buffer_is_not_overwritten():
    held = torch.ones(1, 2, 8, 8, 8)
    sliding_window_inference(image_of((8, 8, 8)), [lambda windows: held], SlidingWindowConfig((8, 8, 8)))
    assert torch.equal(held, torch.ones(1, 2, 8, 8, 8))


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="no networks"):
        sliding_window_inference(image_of((8, 8, 8)), [], SlidingWindowConfig((8, 8, 8)))
    with pytest.raises(ValueError, match="batch size"):
        SlidingWindowConfig((8, 8, 8), batch_size=0)
    with pytest.raises(ValueError, match="dimensions"):
        TorchSession(torch.nn.Identity(), dims=1, device="cpu")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.05)])
def test_reduced_precision_returns_float32_close_by(precision, tolerance):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 4, 3, padding=1)
    windows = image_of((8, 8, 8))[None]
    with torch.inference_mode():
        expected = network(windows)
    logits = TorchSession(network, dims=3, device="cpu", precision=precision)(windows)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_batches_that_do_not_fit_are_halved_and_the_work_goes_on():
    """Memory for two windows: the answer is the same, no window is computed twice more than needed, and one alone must fit."""

    class Small(Recording):
        def __init__(self, most):
            super().__init__()
            self.most, self.refused = most, []

        def __call__(self, windows):
            if len(windows) > self.most:
                self.refused.append(len(windows))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(windows)

    image, seen = image_of((20, 18, 16)), []
    how = SlidingWindowConfig((8, 8, 8), ALL_AXES, batch_size=8)
    network = Small(2)
    result = sliding_window_inference(image, [network], how, lambda *at: seen.append(at))
    torch.testing.assert_close(result, image, rtol=0, atol=2e-6)
    assert network.windows == 4 * 4 * 3 * 8
    assert network.refused == [8, 4]  # it is remembered
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (4 * 4 * 3 * 8, 4 * 4 * 3 * 8)
    with pytest.raises(torch.OutOfMemoryError):
        sliding_window_inference(image, [Small(0)], how)


def test_flips_of_few_windows_share_batches():
    network = Recording()
    image = image_of((8, 8, 8))
    result = sliding_window_inference(image, [network], SlidingWindowConfig((8, 8, 8), ALL_AXES, batch_size=4))
    torch.testing.assert_close(result, image, rtol=0, atol=2e-6)
    assert network.windows == 8
    assert network.batches == 1 + 2  # the plain pass, then seven flips by four


def test_windows_with_nothing_in_them_are_computed_once():
    """They give what they would have given: a network's answer to zeros, here not zero and not symmetric."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(2, 2, 3, padding=1)
    image = torch.zeros(2, 8, 8, 40)
    image[..., :6] = image_of((8, 8, 6))
    how = SlidingWindowConfig((8, 8, 8), (2,), batch_size=2)
    network = Recording(convolution)
    result = sliding_window_inference(image, [network], how)
    assert network.windows == 2 * (2 + 1)  # of nine windows two hold something

    def never_zero(windows):
        # the same network where no window is empty: what was added is taken off again
        return convolution(windows - 1)

    expected = sliding_window_inference(image + 1, [never_zero], how)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
