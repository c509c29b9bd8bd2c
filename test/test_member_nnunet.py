"""The nnunet member against nnunetv2's own nnUNetPredictor: same folder, same images, same answer.

nnUNetPredictor adds up windows in float16, we in float32. Each comparison is therefore made twice: with the predictor as it is, within
the tolerance that we promise; and with its sums in float32, where nothing but rounding may remain.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import shared
from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality, ignore_progress
from ensemble.volume import to_sitk
from nnunet_folders import SPLINE_DATA, SPLINE_LOGITS, FolderSpec, build_folder, small_case

for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(variable, "unused")  # nnunetv2 complains at import otherwise

MIN_DICE = 0.999
MAX_MEAN_DIFFERENCE = 1e-3
MAX_DIFFERENCE_IN_FLOAT32 = 2e-5

TORCH_RESAMPLING = (
    "resample_torch_fornnunet",
    {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False},
)
TWO_D = {
    "configuration": "2d",
    "patch": (32, 24),
    "strides": ((1, 1), (2, 2), (2, 2)),
    "mirror_axes": (0, 1),
    "spacing_mm": (1.7, 1.7),
}
THICK = {"patch": (8, 32, 32), "spacing_mm": (5.0, 1.5, 1.5), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))}
FLIPPED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
PERMUTED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
OBLIQUE = (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0)
NATIVE_2MM = ((22, 40, 36), (2.0, 2.0, 2.0))

#: name -> (folder, shape and spacing (z, y, x) of the case)
PARITY = {
    "plain 3-D, two folds, no resampling": (FolderSpec(folds=("0", "1")), NATIVE_2MM),
    "residual encoder": (FolderSpec(network="ResidualEncoderUNet", mirror_axes=(0, 2)), NATIVE_2MM),
    "resampled, fold_all": (FolderSpec(spacing_mm=(1.7, 1.9, 1.6), folds=("all",)), NATIVE_2MM),
    "coarser network, 3d_lowres that inherits": (
        FolderSpec(configuration="3d_lowres", inherited=True, spacing_mm=(2.7, 2.9, 2.6), patch=(12, 16, 16)),
        NATIVE_2MM,
    ),
    "2d": (FolderSpec(**TWO_D), NATIVE_2MM),
    "2d, thick slices": (FolderSpec(**TWO_D, network="ResidualEncoderUNet"), ((9, 40, 36), (7.0, 1.9, 2.1))),
    "separate z": (FolderSpec(**THICK), ((9, 44, 40), (6.0, 1.8, 1.8))),
    "separate z by the target's spacing": (FolderSpec(**THICK), ((16, 40, 36), (3.5, 2.0, 2.0))),
    "separate z, cubic logits, linear z": (
        FolderSpec(
            **THICK,
            resampling_data=("resample_data_or_seg_to_shape", {**SPLINE_DATA, "order_z": 1}),
            resampling_logits=("resample_data_or_seg_to_shape", {**SPLINE_LOGITS, "order": 3}),
        ),
        ((9, 44, 40), (6.0, 1.8, 1.8)),
    ),
    "torch resampling": (
        FolderSpec(spacing_mm=(1.7, 1.9, 1.6), resampling_data=TORCH_RESAMPLING, resampling_logits=TORCH_RESAMPLING),
        NATIVE_2MM,
    ),
    "torch resampling, separate z": (
        FolderSpec(**THICK, resampling_data=TORCH_RESAMPLING, resampling_logits=TORCH_RESAMPLING),
        ((9, 44, 40), (6.0, 1.8, 1.8)),
    ),
    "transposed": (FolderSpec(transpose_forward=(1, 0, 2), patch=(24, 16, 24)), NATIVE_2MM),
    "transposed in a circle, resampled": (
        FolderSpec(transpose_forward=(2, 0, 1), patch=(24, 16, 16), spacing_mm=(2.1, 1.8, 2.4)),
        NATIVE_2MM,
    ),
    "smaller than a window": (FolderSpec(patch=(32, 32, 48), mirror_axes=None), ((15, 40, 33), (2.0, 2.0, 2.0))),
    "statistics over the whole box": (FolderSpec(use_mask=(False, False)), NATIVE_2MM),
    "CT and no normalisation": (
        FolderSpec(schemes=("CTNormalization", "NoNormalization"), use_mask=(False, False), mirror_axes=(1,)),
        NATIVE_2MM,
    ),
    "rescaled and colour": (
        FolderSpec(schemes=("RescaleTo01Normalization", "RGBTo01Normalization"), use_mask=(False, False)),
        NATIVE_2MM,
    ),
    "three channels": (
        FolderSpec(channels=("FLAIR", "ADC", "DWI"), schemes=("ZScoreNormalization",) * 3, use_mask=(True,) * 3),
        NATIVE_2MM,
    ),
    "one channel, half-precision weights": (
        FolderSpec(channels=("ADC",), schemes=("ZScoreNormalization",), use_mask=(True,), weights_dtype=torch.float16),
        NATIVE_2MM,
    ),
    "old plans": (FolderSpec(old_format=True), NATIVE_2MM),
    "old plans, residual, 2d": (FolderSpec(**TWO_D, network="ResidualEncoderUNet", old_format=True), NATIVE_2MM),
    "batch normalisation": (FolderSpec(norm="batchnorm.BatchNorm"), NATIVE_2MM),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARITY)
def test_same_as_nnunet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, (shape, spacing) = PARITY[name]
    folder, case = build_folder(tmp_path, spec), small_case(shape, spacing)
    probability = ours(folder, case)
    # nnunetv2 finds the network of old plans by importing whatever lies beside it: compare with the same weights in the new format
    reference = build_folder(tmp_path / "new", replace(spec, old_format=False)) if spec.old_format else folder
    expected = nnunet(reference, case, spec.channels)
    assert 0.01 < (expected > 0.5).mean() < 0.5, "the crafted weights give no sensible mask"
    dice, difference = compare(probability, expected)
    assert dice >= MIN_DICE
    assert difference <= MAX_MEAN_DIFFERENCE
    sum_in_float32(monkeypatch)
    np.testing.assert_allclose(
        probability, nnunet(reference, case, spec.channels), rtol=0, atol=MAX_DIFFERENCE_IN_FLOAT32
    )


@pytest.mark.parametrize(
    ("labels", "lesion"),
    [
        ({"background": 0, "oedema": 1, "stroke lesion": 2}, [2]),
        ({"background": 0, "core": 1, "penumbra": 2}, [1, 2]),
        ({"background": 0, "infarct": [1], "old infarct": 2, "ignore": 3}, [1, 2]),
    ],
    ids=["one is named lesion", "none is, all are", "two are, ignore label"],
)
@pytest.mark.slow
def test_several_labels(labels, lesion, tmp_path, monkeypatch):
    spec = FolderSpec(labels=labels)
    folder, case = build_folder(tmp_path, spec), small_case()
    sum_in_float32(monkeypatch)
    np.testing.assert_allclose(
        ours(folder, case), nnunet(folder, case, spec.channels, lesion), rtol=0, atol=MAX_DIFFERENCE_IN_FLOAT32
    )


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient"])
@pytest.mark.parametrize("direction", [FLIPPED, PERMUTED, OBLIQUE], ids=["flipped", "permuted", "oblique"])
def test_readers_that_reorient(reader, direction, tmp_path, monkeypatch):
    """nnunetv2 reads files here, in RAS+ order; we have arrays on the DWI grid, in whatever order it has."""
    spec = FolderSpec(reader=reader, spacing_mm=(2.2, 2.0, 1.7), mirror_axes=None)
    folder, case = build_folder(tmp_path, spec), small_case(spacing_zyx_mm=(2.4, 2.0, 1.8), direction=direction)
    files = [str(tmp_path / f"case_{index:04d}.nii.gz") for index in range(len(spec.channels))]
    for file, name in zip(files, spec.channels, strict=True):
        sitk.WriteImage(to_sitk(case.images[Modality(name.lower())]), file)
    sum_in_float32(monkeypatch)
    predictor(folder).predict_from_files_sequential([files], [str(tmp_path / "mask")])
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "mask.nii.gz")))
    mask = ours(folder, case) > 0.5
    assert expected.sum() > 300
    assert (mask != expected).sum() <= 1


@pytest.mark.slow
def test_a_perturbed_weight_fails_the_comparison(tmp_path, monkeypatch):
    folder, case = build_folder(tmp_path), small_case()
    sum_in_float32(monkeypatch)
    expected = nnunet(folder, case, ("DWI", "ADC"))
    assert np.abs(ours(folder, case) - expected).max() <= MAX_DIFFERENCE_IN_FLOAT32
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"][0, 0, 1, 1, 1] += 0.05
    content["network_weights"]["encoder.stages.0.0.convs.0.all_modules.0.weight"][0, 0, 1, 1, 1] += 0.05
    torch.save(content, path)
    assert np.abs(ours(folder, case) - expected).max() > 100 * MAX_DIFFERENCE_IN_FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spacing"), [("isles22_0009", (3.0, 3.0, 3.0)), ("isles22_0166", (4.8, 2.6, 2.6))])
def test_real_cases(name, spacing, tmp_path, monkeypatch):
    """Coarse networks of random weights: here it is the images that are real."""
    folder = shared(f"cases/{name}")
    files = {modality: next(folder.glob(f"{modality}.[nm]*")) for modality in Modality}
    case = prepare_raw(read_case_files(name, files))
    spec = FolderSpec(
        channels=("DWI", "ADC", "FLAIR"),
        schemes=("ZScoreNormalization",) * 3,
        use_mask=(True,) * 3,
        spacing_mm=spacing,
        patch=(24, 40, 40),
        mirror_axes=(2,),
    )
    model = build_folder(tmp_path, spec)
    probability, expected = ours(model, case), nnunet(model, case, spec.channels)
    dice, difference = compare(probability, expected)
    assert dice >= MIN_DICE
    assert difference <= MAX_MEAN_DIFFERENCE
    sum_in_float32(monkeypatch)
    np.testing.assert_allclose(probability, nnunet(model, case, spec.channels), rtol=0, atol=MAX_DIFFERENCE_IN_FLOAT32)


def ours(folder: Path, case: PreparedCase) -> np.ndarray:
    """Our member's probability (z, y, x)."""
    member = NnunetV2Member.load(MemberSpec("small", "nnunet", folder), InferenceSettings())
    prediction = member.predict(case, InferenceSettings(), ignore_progress)
    assert prediction.probability.grid == case.grid
    assert prediction.probability.array.dtype == np.float32
    return prediction.probability.array


def nnunet(folder: Path, case: PreparedCase, channels: tuple[str, ...], lesion: Sequence[int] = (1,)) -> np.ndarray:
    """nnUNetPredictor's summed probability of some classes (z, y, x)."""
    images = np.stack([case.images[Modality(name.lower())].array for name in channels])
    _, probabilities = predictor(folder).predict_single_npy_array(
        images, {"spacing": list(case.grid.spacing_zyx_mm)}, None, None, True
    )
    return probabilities[list(lesion)].sum(0)


def predictor(folder: Path) -> Any:
    """nnUNetPredictor with all folds of a folder."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    reference = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    folds = sorted(path.name[5:] for path in folder.glob("fold_*"))
    reference.initialize_from_trained_model_folder(str(folder), folds)
    return reference


def sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnUNetPredictor hold sums and weights of windows in float32 instead of float16."""
    from nnunetv2.inference import predict_from_raw_data, sliding_window_prediction

    gaussian = partial(sliding_window_prediction.compute_gaussian.__wrapped__, dtype=torch.float32)
    gaussian.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(predict_from_raw_data, "compute_gaussian", gaussian)
    monkeypatch.setattr(torch, "half", torch.float32)


def compare(probability: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(Dice of the masks, mean absolute difference of the probabilities)."""
    mask, reference = probability > 0.5, expected > 0.5
    dice = 2 * (mask & reference).sum() / (mask.sum() + reference.sum())
    return float(dice), float(np.abs(probability - expected).mean())
