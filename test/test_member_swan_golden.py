"""The swan member against the peer's recorded output: parts, full-size networks, and a whole case by the member and by `process.py run`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import shared
from ensemble.cli import main
from ensemble.families.base import InferenceSettings, NetworkSpec
from ensemble.families.spec import MemberSpec
from ensemble.families.swan import member as swan
from ensemble.families.swan.checkpoints import network_specs
from ensemble.families.swan.folder import NETWORKS, read_swan_folder
from ensemble.families.swan.member import SwanMember
from ensemble.families.swan.network import (
    ARCHITECTURES,
    WIDTHS,
    UNet,
    matrices_to_patches,
    patches_to_matrices,
    rank_one_factors,
)
from ensemble.families.swan.processing import preprocess
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_torch import TorchSession
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, FloatArray, Modality, ignore_progress
from ensemble.volume import from_sitk
from swan_folders import PUBLISHED, filled

SETTINGS = InferenceSettings()
#: Logits reach 27.
CLOSE = 2e-4


def golden(name: str) -> Any:
    """A recorded file of arrays."""
    return np.load(shared(f"golden/swan/outputs/{name}.npz"))


def image(path: Path) -> FloatArray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), np.float32)


def window() -> torch.Tensor:
    """(1, 3, 64, 64, 64): the part of a real case on which single networks were recorded; it has 2 mm voxels."""
    folder = shared("cases/isles22_0009")
    paths = (
        folder / "dwi.nii.gz",
        folder / "adc.nii.gz",
        shared("golden/swan/inputs/flair_registered_isles22_0009.nii.gz"),
    )
    grid = from_sitk(sitk.ReadImage(str(paths[0]))).grid
    return preprocess([image(path) for path in paths], grid)[None, :, 32:96, 16:80, 9:73].contiguous()


def published(kind: str, fold: str = "0") -> NetworkSpec:
    folder = read_swan_folder(shared("golden/swan/weights") / PUBLISHED)
    return network_specs(folder)[list(folder.weights).index((fold, kind))]


def apart(network: UNet, recorded: Any) -> float:
    """Largest difference of any head's logits."""
    with torch.inference_mode():
        levels = network.levels(window())
        ours = [head(maps)[0, 0].numpy() for head, maps in zip(network.heads, levels, strict=False)]
    return max(float(np.abs(answer - recorded[f"head{i}"]).max()) for i, answer in enumerate(ours))


def test_factorisation() -> None:
    with golden("units/micro") as file:
        rows = torch.from_numpy(file["nmf_x"]).reshape(-1, 8, 64).transpose(1, 2)
        u, v = rank_one_factors(rows, torch.from_numpy(file["nmf_v0"])[:, 0])
        np.testing.assert_allclose(u, file["nmf_u"].reshape(-1, 8), atol=2e-6)
        np.testing.assert_allclose(v, file["nmf_v"].reshape(-1, 64), atol=2e-6)
        np.testing.assert_allclose(u[:, :, None] * v[:, None], file["nmf_out"].reshape(-1, 8, 64), atol=2e-6)


def test_patches() -> None:
    """The peer's matrices of numbers that tell where they come from, and the mean of what comes back of their squares."""
    with golden("units/micro") as file:
        n, channels, *size = [2, 16, 8, 8, 8]
        assert list(file["swm_shape"]) == [16, 8, 8, 64]
        maps = torch.arange(float(np.prod([n, channels, *size]))).reshape(n, channels, *size).movedim(1, -1)
        shifted = [patches_to_matrices(maps, shift) for shift in (0, 1, 2, 3)]
        theirs = torch.from_numpy(file["swm_out_int32"]).reshape(-1, 8, 64).transpose(1, 2)
        assert torch.equal(torch.cat(shifted), theirs.float())
        back = sum(matrices_to_patches((rows / 100) ** 2, shift, maps.shape) for shift, rows in enumerate(shifted)) / 4
        np.testing.assert_allclose(torch.as_tensor(back).movedim(-1, 1), file["swm_inv_of_sq"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_heads_of_the_small_networks(kind: str) -> None:
    network = published(kind).build()
    assert isinstance(network, UNet)
    with golden(f"units/window_small_{kind}_fold0") as recorded:
        assert apart(network, recorded) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_full_size_networks_with_weights_by_formula(kind: str) -> None:
    network = filled(ARCHITECTURES[kind](WIDTHS, 3), "net.")
    with golden(f"units/window_full_formula_{kind}") as recorded:
        assert apart(network, recorded) < CLOSE


# --- a whole case ------------------------------------------------------------------------------------------------------------------------


class Remembered:
    """A session that answers the same window once: ten networks of four different files are asked, and seven tests."""

    def __init__(self, session: LoadedSession) -> None:
        self.session, self.device, self.arithmetic, self.reduced_precision = (
            session,
            session.device,
            session.arithmetic,
            self,
        )
        self.answers: dict[int, torch.Tensor] = {}

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        keys = [zlib.crc32(one.numpy().tobytes()) for one in windows.contiguous()]
        for key, one in zip(keys, windows, strict=True):
            if key not in self.answers:
                self.answers[key] = self.session(one[None])[0]
        return torch.stack([self.answers[key] for key in keys])


@pytest.fixture(scope="module")
def remembered() -> dict[bytes, Remembered]:
    return {}


@pytest.fixture
def weights(tmp_path: Path, remembered: dict[bytes, Remembered], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive of ten networks, in which folds 2, 3 and 4 are folds 0, 1 and 0."""
    source, folder = shared("golden/swan/weights") / PUBLISHED, tmp_path / "weights" / PUBLISHED
    folder.mkdir(parents=True)
    for fold, same in enumerate((0, 1, 0, 1, 0)):
        (folder / f"fold{fold}").symlink_to((source / f"fold{same}").resolve())

    def opened(
        _: MemberSpec, networks: Sequence[NetworkSpec], settings: InferenceSettings
    ) -> tuple[LoadedSession, ...]:
        return tuple(known(network) for network in networks)

    def known(network: NetworkSpec) -> Remembered:
        key = network.weights.read_bytes()
        if key not in remembered:
            remembered[key] = Remembered(TorchSession(network.build(), dims=3, device="cpu"))
        return remembered[key]

    monkeypatch.setattr(swan, "open_sessions", opened)
    return tmp_path / "weights"


def files() -> dict[Modality, Path]:
    names = {Modality.DWI: "dwi", Modality.ADC: "adc", Modality.FLAIR: "flair_registered"}
    return {modality: shared(f"golden/swan/inputs/aniso_{name}.nii.gz") for modality, name in names.items()}


def assert_agreement(probability: AnyArray, mask: AnyArray) -> None:
    """Same mask (Dice of at least 0.999) and probability (mean absolute difference of at most 2e-3, in each 32nd voxel)."""
    theirs = image(shared("golden/swan/outputs/aniso_eval/lesion_msk.nii.gz")) > 0
    assert theirs.sum() == 227
    dice = 2 * (mask & theirs).sum() / (mask.sum() + theirs.sum())
    assert dice >= 0.999, f"Dice {dice:.5f}, {(mask != theirs).sum()} voxels differ"
    with golden("aniso_eval/ensemble_logit") as file:  # of which it is a tenth
        expected = 1 / (1 + np.exp(-10 * file["ens_logit_native_stride4"]))
    difference = np.abs(probability.transpose(2, 1, 0)[::4, ::4, ::2] - expected).mean()
    assert difference <= 2e-3, f"mean absolute difference {difference:.1e}"


def test_input_of_the_networks() -> None:
    case = prepare_raw(read_case_files("aniso", files()), registration="never")
    array = preprocess([case.as_read[modality].array for modality in Modality], case.grid)
    with golden("aniso_eval/input") as file:
        np.testing.assert_allclose(array, file["input_2mm"], atol=1e-5)
        np.testing.assert_array_equal(array != 0, file["input_2mm"] != 0)


@pytest.mark.slow
def test_golden_case(weights: Path) -> None:
    case = prepare_raw(read_case_files("aniso", files()), registration="never")
    member = SwanMember.load(MemberSpec("swan", "swan", weights / PUBLISHED), SETTINGS)
    prediction = member.predict(case, SETTINGS, ignore_progress)
    assert (prediction.networks, prediction.remark) == (10, "")
    assert_agreement(prediction.probability.array, prediction.mask.array)


@pytest.mark.slow
def test_golden_case_by_the_command(weights: Path, tmp_path: Path) -> None:
    options = ["run", "--weights", str(weights), "--members", "swan", "--registration", "never", "--save-probabilities"]
    images = [text for modality, path in files().items() for text in (f"--{modality}", str(path))]
    assert main([*options, *images, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert_agreement(image(tmp_path / "out/probability.nii.gz"), image(tmp_path / "out/mask.nii.gz") > 0)


@pytest.mark.slow
def test_the_comparison_fails_when_one_weight_is_perturbed(weights: Path) -> None:
    case = prepare_raw(read_case_files("aniso", files()), registration="never")
    member = SwanMember.load(MemberSpec("swan", "swan", weights / PUBLISHED), SETTINGS)
    network = published("resunet").build()
    with torch.no_grad():
        head = dict(network.named_parameters())["heads.0.weight"].view(-1)
        head[head.abs().argmax()] *= 1.1
    perturbed = TorchSession(network, dims=3, device="cpu")
    first, *others = member.sessions
    sessions = tuple(Remembered(perturbed) if session is first else session for session in (first, *others))
    changed = SwanMember(member.spec, sessions, "")
    prediction = changed.predict(case, SETTINGS, ignore_progress)
    with pytest.raises(AssertionError, match="Dice|mean absolute difference"):
        assert_agreement(prediction.probability.array, prediction.mask.array)
