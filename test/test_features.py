"""What an encoder makes of a case: told with the prediction where it is asked for, and no prediction changes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemble.config import Precision, SessionKind
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.inference.engine import MirrorMode, SlidingWindowConfig, sliding_window_inference
from ensemble.inference.features import FeaturePool
from ensemble.inference.session_openvino import OpenVinoSession, open_openvino_session
from ensemble.inference.session_torch import TorchSession
from ensemble.types import ignore_progress
from nnunet_folders import FolderSpec, build_folder, small_case


class Half(nn.Module):
    """A network whose layer `encoder` halves the window, and whose logits are the first two channels of the input."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential((nn.Conv3d if dims == 3 else nn.Conv2d)(3, 5, 2, stride=2), nn.LeakyReLU())
        for parameter in self.encoder.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(parameter.shape)))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        maps = self.encoder(windows)
        return windows[:, :2] + 0 * maps.mean()


def windows(dims: int) -> torch.Tensor:
    return torch.randn((2, 3, *((8, 8, 8) if dims == 3 else (1, 8, 8))), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [2, 3])
def test_every_session_tells_what_the_layer_gives(dims: int) -> None:
    network, given = Half(dims).eval(), windows(dims)
    with torch.inference_mode():
        expected = network.encoder(given if dims == 3 else given.squeeze(2)).reshape(2, 5, *([4] * 3)[3 - dims :])
    on_cpu = open_openvino_session(network, 3, (4,) * dims, "fp32", "encoder")
    assert isinstance(on_cpu, OpenVinoSession)
    for session in (on_cpu, TorchSession(network, dims=dims, device="cpu", tap="encoder")):
        logits, maps = session.tapped(given)
        assert torch.equal(logits, session(given))
        assert maps.shape[2] == (4 if dims == 3 else 1)
        torch.testing.assert_close(maps.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def pooled(image: torch.Tensor, tta: MirrorMode = MirrorMode.NONE, batch: int = 1) -> FeaturePool:
    pool, session = FeaturePool(), TorchSession(Half(), dims=3, device="cpu", tap="encoder")
    how = SlidingWindowConfig((8, 8, 8), (0, 1, 2), tta, batch_size=batch)
    sliding_window_inference(image, [session], how, pool=pool)
    return pool


def image_of(*shape: int) -> torch.Tensor:
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(2))


def test_pooled_is_the_mean_over_the_image_and_over_the_foreground() -> None:
    image = image_of(8, 8, 8)
    image[:, :, :, 4:] = 0  # half of the window is empty
    image[1] -= image[0] + 1
    image[:2, :2, :2, :2] = torch.tensor([0.0, 5.0])[:, None, None, None]  # one cell of foreground
    image[:, :, :, 4:] = 0
    features = pooled(image).features()
    with torch.inference_mode():
        maps = Half().encoder(image[None])[0]
    inside = (image[:2, ...].argmax(0) > 0) & (image != 0).any(0)
    share = nn.functional.avg_pool3d(inside[None, None].float(), 2)[0]
    assert features is not None
    assert features.foreground is not None
    np.testing.assert_allclose(features.whole, maps[:, :, :, :2].mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(features.foreground, (maps * share).sum((1, 2, 3)) / share.sum(), rtol=1e-4)


@pytest.mark.parametrize("tta", [MirrorMode.MIRROR, MirrorMode.GATED])
@pytest.mark.parametrize("batch", [1, 4])
def test_mirrored_passes_and_batches_change_no_feature(tta: MirrorMode, batch: int) -> None:
    image = image_of(20, 12, 9)
    plain, other = pooled(image).features(), pooled(image, tta, batch).features()
    assert plain is not None
    assert other is not None
    np.testing.assert_allclose(plain.whole, other.whole, rtol=1e-6)


def test_nothing_in_the_image_is_no_feature_and_no_foreground_none_of_the_lesion() -> None:
    assert pooled(torch.zeros(3, 8, 8, 8)).features() is None
    image = image_of(8, 8, 8)
    image[0] = 100.0  # background everywhere
    features = pooled(image).features()
    assert features is not None
    assert features.foreground is None


def test_a_map_beyond_its_precision_is_no_feature() -> None:
    pool = FeaturePool()
    pool.add(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 2, 2, 2, 2), torch.full((1, 3, 1, 1, 1), torch.inf))
    assert pool.features() is None


def test_what_ran_out_of_memory_counts_once() -> None:
    class Full(TorchSession):
        """Takes no two windows at once."""

        def tapped(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if len(windows) > 1:
                raise torch.OutOfMemoryError
            return super().tapped(windows)

    image, pool = image_of(20, 12, 9), FeaturePool()
    session = Full(Half(), dims=3, device="cpu", tap="encoder")
    sliding_window_inference(image, [session], SlidingWindowConfig((8, 8, 8), batch_size=4), pool=pool)
    again, expected = pool.features(), pooled(image).features()
    assert again is not None
    assert expected is not None
    np.testing.assert_allclose(again.whole, expected.whole, rtol=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("no such kernel")])
def test_what_goes_wrong_in_pooling_costs_the_features_and_no_answer(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose answers are there is not computed again, and none counts twice."""

    def broken(*_: object) -> None:
        raise error

    image, session = image_of(20, 12, 9), TorchSession(Half(), dims=3, device="cpu", tap="encoder")
    for batch in (1, 4):
        how = SlidingWindowConfig((8, 8, 8), batch_size=batch)
        expected = sliding_window_inference(image, [session], how)
        with monkeypatch.context() as patched:
            patched.setattr("torch.nn.functional.adaptive_avg_pool3d", broken)
            pool = FeaturePool()
            assert torch.equal(sliding_window_inference(image, [session], how, pool=pool), expected)
            assert pool.features() is None
        sliding_window_inference(image, [session], how, pool=pool)
        assert pool.features() is not None  # the next image begins anew


@pytest.mark.parametrize("tappable", [True, False])
def test_a_layer_that_openvino_cannot_tell_of_does_not_move_the_network_to_pytorch(
    tappable: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_taps(*given: Any) -> OpenVinoSession | None:
        *_, tap = given
        return open_openvino_session(*given) if tappable or not tap else None

    monkeypatch.setattr("ensemble.families.sessions.open_openvino_session", without_taps)
    found = predicted(folder, "auto", features=True)
    assert found.arithmetic == "fp32, OpenVINO"
    assert (found.features is not None) == tappable


@pytest.fixture(scope="module", params=["PlainConvUNet", "ResidualEncoderUNet", "2d"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flat = {"configuration": "2d", "patch": (32, 24), "strides": ((1, 1), (2, 2)), "mirror_axes": (0, 1)}
    spec = FolderSpec(**flat, spacing_mm=(2.0, 2.0)) if request.param == "2d" else FolderSpec(network=request.param)  # type: ignore[arg-type]
    return build_folder(tmp_path_factory.mktemp("weights"), spec)


def predicted(folder: Path, session: SessionKind, precision: Precision = "auto", *, features: bool) -> MemberPrediction:
    settings = InferenceSettings(session=session, precision=precision, features=features)
    member = NnunetV2Member.load(MemberSpec("small", "nnunet", folder), settings)
    return member.predict(small_case((12, 20, 18), (2.0, 2.0, 2.0)), settings, ignore_progress)


@pytest.mark.parametrize(("session", "precision"), [("auto", "fp32"), ("auto", "bf16"), ("torch", "fp32")])
def test_a_member_tells_its_features_and_its_mask_is_the_same_to_the_bit(
    folder: Path, session: SessionKind, precision: Precision
) -> None:
    off = predicted(folder, session, precision, features=False)
    on = predicted(folder, session, precision, features=True)
    assert np.array_equal(off.probability.array, on.probability.array)
    assert off.features is None
    assert on.features is not None
    assert on.features.whole.shape == (12,)
    assert on.features.foreground is not None
    assert not np.allclose(on.features.whole, on.features.foreground)


def test_features_are_the_same_for_any_number_of_threads(folder: Path) -> None:
    threads, told = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            told.append(predicted(folder, "auto", features=True).features)
    finally:
        torch.set_num_threads(threads)
    for other in told[1:]:
        assert told[0] is not None
        assert other is not None
        assert np.array_equal(told[0].whole, other.whole)
