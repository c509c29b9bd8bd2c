"""The nvauto member against the peer's recorded output on a real case: same weights, same mask.

The whole case takes two minutes of one core: GOLDEN_WHOLE=1 pytest test/test_member_nvauto_golden.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import shared
from ensemble.cli import main
from ensemble.families.base import InferenceSettings
from ensemble.families.nvauto import rebuild
from ensemble.families.nvauto.member import BLENDING, CHANNELS, WINDOW, NvautoMember, network_specs
from ensemble.families.nvauto.processing import ResampleTo1Mm, normalise_channels
from ensemble.families.sessions import open_session
from ensemble.families.spec import MemberSpec
from ensemble.inference.engine import SlidingWindowConfig, sliding_window_inference
from ensemble.members.pack import pack_members
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, Modality, ignore_progress
from ensemble.weights.checkpoints import load_weights
from nvauto_files import PUBLISHED

CASE = "isles22_0009"
whole = pytest.mark.skipif(os.environ.get("GOLDEN_WHOLE") != "1", reason="takes minutes: GOLDEN_WHOLE=1")


def golden(name: str) -> Path:
    return shared(f"golden/nvauto/outputs/{CASE}") / name


def scripts() -> Path:
    return shared("golden/nvauto/weights") / PUBLISHED


def golden_case() -> PreparedCase:
    folder = shared(f"cases/{CASE}")
    return prepare_raw(read_case_files(CASE, {m: folder / f"{m}.nii.gz" for m in (Modality.DWI, Modality.ADC)}))


def golden_input() -> torch.Tensor:
    case = golden_case()
    images = np.stack([case.as_read[modality].array.transpose() for modality in CHANNELS])
    return normalise_channels(ResampleTo1Mm.of(case.grid).forward(torch.from_numpy(images)))


def assert_agreement(probability: AnyArray, mask: AnyArray) -> None:
    """Same mask (Dice of at least 0.999) and probabilities (mean absolute difference of at most 2e-3)."""
    lesion = sitk.GetArrayFromImage(sitk.ReadImage(str(golden("lesion_msk.nii.gz")))) > 0
    assert lesion.sum() == 131
    dice = 2 * (lesion & mask).sum() / (lesion.sum() + mask.sum())
    difference = np.abs(
        probability - sitk.GetArrayFromImage(sitk.ReadImage(str(golden("mean_prob_fg_dwi.nii.gz"))))
    ).mean()
    assert dice >= 0.999, f"Dice {dice:.5f}"
    assert difference <= 2e-3, f"mean absolute difference {difference:.1e}"


@pytest.mark.slow
def test_golden_input() -> None:
    """To the last bit nearly, and 0 where MONAI's rounding leaves 0."""
    ours = golden_input().numpy()
    with np.load(golden("input_1mm.npz")) as file:
        assert ours.shape == tuple(file["shape"])
        np.testing.assert_array_equal(ResampleTo1Mm.of(golden_case().grid).fine_affine, file["affine"])
        for part, theirs in (
            (ours[:, ::4, ::4, ::4], file["stride4"]),
            (ours[:, 90:130, 90:130, 60:92], file["block"]),
        ):
            np.testing.assert_allclose(part, theirs, atol=1e-5, rtol=0)
            np.testing.assert_array_equal(part == 0, theirs == 0)
    assert [(channel != 0).sum() for channel in ours] == [1543276, 1543276]


@whole
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_golden_member(tmp_path: Path, packed: bool) -> None:
    folder = pack_members(scripts(), tmp_path / "packed", "fp32")[0] if packed else scripts()
    settings = InferenceSettings(allow_torchscript=not packed)
    member = NvautoMember.load(MemberSpec("nvauto", "nvauto", folder), settings)
    probability = member.predict(golden_case(), settings, ignore_progress).probability.array
    assert_agreement(probability, probability > 0.5)


@whole
@pytest.mark.slow
def test_golden_run(tmp_path: Path) -> None:
    case, weights = shared(f"cases/{CASE}"), shared("golden/nvauto/weights")
    arguments = ["--device=cpu", f"--weights={weights}", "--members=nvauto", "--allow-torchscript"]
    images = [f"--dwi={case / 'dwi.nii.gz'}", f"--adc={case / 'adc.nii.gz'}", f"--out={tmp_path / 'out'}"]
    assert main(["run", *images, *arguments, "--save-probabilities"]) == 0
    mask, probability = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz")))
        for name in ("mask", "probability")
    )
    assert_agreement(probability, mask > 0)


@whole
@pytest.mark.slow
def test_the_comparison_fails_when_one_weight_is_perturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One network rebuilt, and again with one weight of its head a tenth larger, against its recorded logits."""

    def load_perturbed(network: torch.nn.Module, *rest: Any) -> None:
        load_weights(network, *rest)
        head = dict(network.named_parameters())["up_layers.2.head.weight"].view(-1)
        with torch.no_grad():
            head[head.abs().argmax()] *= 1.1

    pack_members(scripts(), tmp_path / "packed", "fp32")
    image, how = golden_input(), SlidingWindowConfig(WINDOW, blending=BLENDING)

    def difference() -> float:
        network = network_specs(tmp_path / "packed")[1]
        logits = sliding_window_inference(image, [open_session(network, InferenceSettings())], how)
        with np.load(golden("per_model.npz")) as file:
            block = np.abs(logits[:, 98:122, 98:122, 68:84].numpy() - file["logits_1mm_block_model1"]).max()
            softmax = logits.softmax(0)[1, ::4, ::4, ::4].numpy()
            return float(max(block, np.abs(softmax - file["p1_1mm_stride4_model1"]).max()))

    assert difference() < 1e-3
    monkeypatch.setattr(rebuild, "load_weights", load_perturbed)
    assert difference() > 1e-2
