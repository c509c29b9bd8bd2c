"""The seals member against a plain reimplementation of its steps on small models; its files, whole and broken."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import binary_fill_holes
from skimage.transform import resize

from conftest import phantom_arrays, shared, write_image
from ensemble.errors import WeightsBroken
from ensemble.families import sessions
from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v1.member import NnunetV1Member
from ensemble.families.nnunet_v1.network import build_nnunet_v1_network
from ensemble.families.nnunet_v1.plans import parse_plans
from ensemble.families.nnunet_v1.processing import grid_at_1mm, postprocess, preprocess
from ensemble.families.probability import lesion_probability_from_softmax
from ensemble.families.spec import MemberSpec
from ensemble.geometry import Grid
from ensemble.inference.tiling import Tiling, gaussian_importance
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, Modality, ignore_progress
from ensemble.volume import Volume
from ensemble.weights.pickles import read_pickle
from nnunet_folders import small_case
from nnunet_v1_folders import (
    V1Spec,
    build_v1_folder,
    random_network,
    v1_description,
    write_numpy1_pickle,
    write_pickle,
)

DWI, ADC = Modality.DWI, Modality.ADC
SETTINGS = InferenceSettings()


def loaded(folder: Path, **spec: Any) -> NnunetV1Member:
    return NnunetV1Member.load(MemberSpec("seals", "seals", folder, **spec), SETTINGS)


def probability(member: NnunetV1Member, case: PreparedCase, settings: InferenceSettings = SETTINGS) -> AnyArray:
    return member.predict(case, settings, ignore_progress).probability.array


# --- small models against a plain reimplementation -----------------------------------------------------------------------------------


def reference(case: PreparedCase, spec: V1Spec, folds: int = 1) -> tuple[AnyArray, AnyArray]:
    """(mean softmax of lesion on the DWI grid, mask by argmax), step by step as the peer's scripts and nnU-Net v1 do it."""
    fine = {modality: at_1mm(case.images[modality]) for modality in (DWI, ADC)}
    data = np.stack([fine[modality] for modality in (DWI, ADC)])
    region = binary_fill_holes((data != 0).any(0))
    low, high = np.argwhere(region).min(0), np.argwhere(region).max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    data, region = data[:, *box], region[box]
    order = spec.transpose_forward
    data, region = data.transpose(0, *[axis + 1 for axis in order]), region.transpose(order)
    shape = np.round(np.array(data.shape[1:]) / np.array(spec.spacing_mm)).astype(int)
    if tuple(shape) != region.shape:
        data = np.stack([resized(channel, shape, 3) for channel in data])
        region = resized(region.astype(float), shape, 1) >= 0.5
    for channel, scheme, mask in zip(data, spec.schemes, spec.use_mask, strict=True):
        if scheme == "nonCT":
            inside = region if mask else np.ones_like(region)
            channel[inside] = (channel[inside] - channel[inside].mean()) / (channel[inside].std() + 1e-8)
            channel[~inside] = 0
    total = np.zeros((2, *case.grid.shape_zyx))
    for fold in range(folds):
        softmax = windows(data.astype(np.float32), random_network(spec, fold), spec.patch)
        softmax = softmax.transpose(0, *[axis + 1 for axis in np.argsort(order)])
        size = [part.stop - part.start for part in box]
        if list(softmax.shape[1:]) != size:
            softmax = np.stack([resized(channel, np.array(size), 1) for channel in softmax])
        whole = np.zeros((2, *fine[DWI].shape), np.float32)
        whole[0] = 1
        whole[:, *box] = softmax.astype(np.float16)
        total += np.stack([back(channel, case.grid) for channel in whole])
    total /= folds
    return total[1], total[1] > total[0]


def at_1mm(volume: Volume) -> AnyArray:
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.grid.spacing_mm)
    return sitk.GetArrayFromImage(
        linear(image, [int(n * mm) for n, mm in zip(volume.grid.size, volume.grid.spacing_mm, strict=True)], (1, 1, 1))
    )


def back(channel: AnyArray, grid: Grid) -> AnyArray:
    return sitk.GetArrayFromImage(linear(sitk.GetImageFromArray(channel), grid.size, grid.spacing_mm))


def linear(image: sitk.Image, size: Any, spacing: Any) -> sitk.Image:
    return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, (0, 0, 0), spacing, image.GetDirection())


def resized(array: AnyArray, shape: AnyArray, order: int) -> AnyArray:
    return resize(array.astype(float), shape, order, mode="edge", anti_aliasing=False)


@torch.inference_mode()
def windows(data: AnyArray, network: torch.nn.Module, patch: tuple[int, ...]) -> AnyArray:
    """Softmax (2, a, b, c): all windows one after another, all eight flips of each."""
    size: Any = data.shape[1:]
    tiling = Tiling(size, patch)  # type: ignore[arg-type]
    padded = np.pad(data, ((0, 0), *tiling.padding))
    importance = gaussian_importance(patch)  # type: ignore[arg-type]
    total, weight = np.zeros((2, *padded.shape[1:])), np.zeros(padded.shape[1:])
    flips = [flip for count in range(4) for flip in combinations((2, 3, 4), count)]
    for window in tiling.windows():
        tile = torch.from_numpy(padded[None, :, *window])
        softmax = sum(network(tile.flip(flip)).softmax(1).flip(flip) for flip in flips) / 8
        total[:, *window] += softmax[0].numpy() * importance
        weight[window] += importance
    return (total / weight)[:, *tiling.inside]


VARIANTS = {
    "as published": V1Spec(),
    "transposed": V1Spec(transpose_forward=(2, 0, 1)),
    "window larger than the image": V1Spec(patch=(64, 48, 64)),
    "no mask": V1Spec(use_mask=(False, True)),
    "ADC as it is": V1Spec(schemes=("nonCT", "noNorm")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_same_as_the_plain_steps(tmp_path: Path, name: str) -> None:
    case, spec = small_case((14, 22, 18), (2.0, 1.5, 1.5)), VARIANTS[name]
    ours = probability(loaded(build_v1_folder(tmp_path, spec)), case)
    expected, mask = reference(case, spec)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert 0.02 < mask.mean() < 0.98
    assert ((ours > 0.5) != mask).sum() <= 2  # float16 rounds differently where sums differ in their last bits


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.9, 1.3, 1.3), (1.0, 1.0, 1.5)])
def test_plans_of_another_spacing_resample(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    case, spec = small_case((14, 22, 18), (2.0, 1.5, 1.5)), V1Spec(spacing_mm=spacing, patch=(8, 16, 16))
    ours = probability(loaded(build_v1_folder(tmp_path, spec)), case)
    expected, mask = reference(case, spec)
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert ((ours > 0.5) != mask).sum() <= 2


@pytest.mark.slow
def test_folds_are_averaged_on_the_image_grid(tmp_path: Path) -> None:
    case, spec = small_case((14, 22, 18), (2.0, 1.5, 1.5)), V1Spec(folds=("fold_0", "fold_1", "fold_2"))
    told: list[tuple[int, int]] = []
    member = loaded(build_v1_folder(tmp_path, spec))
    prediction = member.predict(case, InferenceSettings(), lambda done, total: told.append((done, total)))
    expected, mask = reference(case, spec, folds=3)
    assert prediction.networks == 3
    np.testing.assert_allclose(prediction.probability.array, expected, atol=1e-3)
    assert ((prediction.probability.array > 0.5) != mask).sum() <= 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    assert len({total for _, total in told}) == 1


@pytest.mark.slow
def test_grids_of_more_than_255_voxels(tmp_path: Path) -> None:
    case, spec = small_case((6, 12, 90), (2.0, 2.0, 3.0)), V1Spec(patch=(16, 16, 64))
    assert grid_at_1mm(case.grid).size == (270, 24, 12)
    ours = probability(loaded(build_v1_folder(tmp_path, spec)), case)
    np.testing.assert_allclose(ours, reference(case, spec)[0], atol=1e-3)


@pytest.mark.slow
def test_a_dwi_of_integers_is_interpolated_in_full(tmp_path: Path) -> None:
    """The peer's 1 mm DWI keeps the file's pixel type, which truncates; ours is what the same DWI in floats gives."""
    grid = Grid((30, 30, 20), (2.0, 2.0, 2.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    arrays = phantom_arrays(grid)
    dwi, adc = np.round(arrays[DWI]), arrays[ADC]
    cases = []
    for dtype in (np.int16, np.float32):
        files = {
            DWI: write_image(dwi.astype(dtype), tmp_path / f"{dtype.__name__}.nii.gz", grid),
            ADC: write_image(adc, tmp_path / "adc.nii.gz", grid),
        }
        cases.append(prepare_raw(read_case_files("case", files), brain_ml=(50.0, 2500.0)))
    fine = resample_volume(cases[0].images[DWI], grid_at_1mm(grid)).array
    assert (fine % 1 != 0).any()
    member = loaded(build_v1_folder(tmp_path / "model"))
    np.testing.assert_array_equal(*(probability(member, case) for case in cases))


def test_beyond_the_1mm_grid_is_background() -> None:
    """At half a millimetre the last voxels lie beyond the grid at 1 mm, whose size is rounded down."""
    grid = Grid((9, 9, 9), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    fine = grid_at_1mm(grid)
    assert fine.size == (4, 4, 4)
    images = np.ones((2, *fine.shape_zyx), np.float32)
    plans = parse_plans(v1_description(V1Spec()))
    _, placement = preprocess(images, plans)
    softmax = np.stack([np.zeros(fine.shape_zyx, np.float32), np.ones(fine.shape_zyx, np.float32)])
    result = lesion_probability_from_softmax(postprocess(softmax, placement, plans, fine, grid))
    assert result[0, 0, 0] == 1
    assert result[-1, -1, -1] == 0


def test_a_tie_is_background_and_a_hair_more_is_lesion() -> None:
    values = np.array([0.5, 0.49987793, 0.3, 0.0], np.float32)
    lesion = np.array([0.5, 0.5, 0.30000004, 0.0], np.float32)
    assert list(lesion_probability_from_softmax(np.stack([values, lesion])) > 0.5) == [False, True, True, False]


# --- names, files ----------------------------------------------------------------------------------------------------------------------


def test_parameter_names_are_those_of_nnunet_v1() -> None:
    names = {name.rpartition(".")[0] for name in random_network(V1Spec(), 0).state_dict()}
    block = ("conv", "instnorm")
    down = {f"conv_blocks_context.{level}.blocks.{i}.{part}" for level in (0, 1) for i in (0, 1) for part in block}
    deep = {f"conv_blocks_context.2.{i}.blocks.0.{part}" for i in (0, 1) for part in block}
    up = {f"conv_blocks_localization.{u}.{i}.blocks.0.{part}" for u in (0, 1) for i in (0, 1) for part in block}
    assert names == down | deep | up | {"tu.0", "tu.1", "seg_outputs.0", "seg_outputs.1"}


def test_the_full_size_network_is_that_of_the_planner() -> None:
    plans = read_pickle(shared("golden/seals_v1/plans_full_planner_output.pkl"))
    network = build_nnunet_v1_network(parse_plans({"init": (), "name": "nnUNetTrainerV2", "plans": plans}))
    assert sum(parameter.numel() for parameter in network.parameters()) == 31_195_648


OLD_STAGE = {"patch_size": [16, 16, 24], "current_spacing": [1, 1, 1], "num_pool_per_axis": [1, 2, 2]}
LAYOUTS = {
    "no DDP prefix": V1Spec(prefix=""),
    "no gradient scaler": V1Spec(scaler=False),
    "torch's old file format": V1Spec(zipped=False),
    "all cases": V1Spec(folds=("all",)),
    "some folds": V1Spec(folds=("fold_1", "fold_3")),
    "second stage": V1Spec(stages=2),
    "second stage, trained in parallel": V1Spec(stages=2, trainer="nnUNetTrainerV2_DDP"),
    "old plans": V1Spec(
        pools=((1, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 3, changed_plans={"plans_per_stage": {0: OLD_STAGE}}
    ),
    "sure of its way back": V1Spec(
        changed_plans={
            "segmentation_export_params": {
                "force_separate_z": False,
                "interpolation_order": 1,
                "interpolation_order_z": 0,
            }
        }
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    spec = MemberSpec("seals", "seals", build_v1_folder(tmp_path, LAYOUTS[name]))
    member = NnunetV1Member.load(spec, InferenceSettings(session="torch"))
    assert len(member.sessions) == len(LAYOUTS[name].folds)
    assert member.requires == {DWI, ADC}
    for number, session in enumerate(member.sessions):
        expected = random_network(LAYOUTS[name], number).state_dict()
        for key, tensor in session.network.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


def test_pickles_of_numpy_1_load(tmp_path: Path) -> None:
    folder = build_v1_folder(tmp_path)
    write_numpy1_pickle(v1_description(V1Spec()), folder / "fold_0" / "model_final_checkpoint.model.pkl")
    assert loaded(folder).plans.patch == (16, 16, 24)


def test_images_named_by_the_manifest(tmp_path: Path) -> None:
    folder = build_v1_folder(tmp_path, V1Spec(modalities={0: "first", 1: "second"}))
    with pytest.raises(WeightsBroken, match="not clear which images"):
        loaded(folder)
    assert loaded(folder, channels=("ADC", "DWI")).modalities == (ADC, DWI)
    for channels in (("DWI",), ("DWI", "ADC[-1]")):
        with pytest.raises(WeightsBroken, match="not clear which images"):
            loaded(folder, channels=channels)
    with pytest.raises(WeightsBroken, match="only accepts images as read"):
        loaded(folder, channels=("DWI", "ADC"), intensities="tissue_normalized")


WEIGHTS, DESCRIPTION = "fold_0/model_final_checkpoint.model", "fold_0/model_final_checkpoint.model.pkl"


def describe(folder: Path, **changes: Any) -> None:
    write_pickle(v1_description(V1Spec(**changes)), folder / DESCRIPTION)


def changed_plans(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: describe(folder, changed_plans=changes)


def edit_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = torch.load(folder / WEIGHTS, weights_only=False)
        change(content)
        torch.save(content, folder / WEIGHTS)

    return edit


def halve(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


#: what is done to a folder, and what the complaint must say
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folds": (lambda folder: shutil.rmtree(folder / "fold_0"), r"has no fold_\*"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "a fold has no model_final_checkpoint.model"),
    "an empty second fold": (lambda folder: (folder / "fold_1").mkdir(), "fold_1"),
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "does not exist"),
    "no plans": (lambda folder: (folder / "plans.pkl").unlink(), "plans.pkl"),
    "truncated weights": (halve(WEIGHTS), "damaged"),
    "truncated description": (halve(DESCRIPTION), "is damaged"),
    "truncated plans": (halve("plans.pkl"), "plans.pkl"),
    "hostile description": (lambda folder: write_pickle({"plans": print}, folder / DESCRIPTION), "builtins.print"),
    "hostile weights": (edit_weights(lambda content: content.update(plot_stuff=print)), "print"),
    "not of nnU-Net": (edit_weights(lambda content: content.pop("state_dict")), "not written by nnU-Net v1"),
    "other network": (lambda folder: describe(folder, features=8), "does not fit"),
    "weights that are not numbers": (
        edit_weights(lambda content: next(iter(content["state_dict"].values())).fill_(float("nan"))),
        "not finite",
    ),
    "plans of other images": (
        lambda folder: write_pickle({"num_modalities": 3}, folder / "plans.pkl"),
        "different models",
    ),
    "plans that are a list": (lambda folder: write_pickle([], folder / "plans.pkl"), "different models"),
    "description that is a list": (
        lambda folder: write_pickle([], folder / DESCRIPTION),
        "does not describe a supported model",
    ),
    "no stages": (changed_plans(plans_per_stage={}), "does not describe a supported model"),
    "2-D": (changed_plans(plans_per_stage={0: {**OLD_STAGE, "patch_size": [64, 64]}}), "only 3-D"),
    "three classes": (lambda folder: describe(folder, classes=3), "num_classes is 3"),
    "trainer of another network": (
        lambda folder: describe(folder, trainer="nnUNetTrainerV2_ReLU"),
        "nnUNetTrainerV2_ReLU",
    ),
    "CT": (lambda folder: describe(folder, schemes=("CT", "nonCT")), "for CT"),
    "window that poolings do not divide": (lambda folder: describe(folder, patch=(16, 16, 26)), "not divisible"),
    "huge network": (lambda folder: describe(folder, features=100_000), "base_num_features"),
    "kernels and poolings": (lambda folder: describe(folder, kernels=((3, 3, 3),) * 2), "2 poolings, 2 kernels"),
    "five": (lambda folder: describe(folder, kernels=((5, 3, 3),) * 3), "kernel"),
    "no spacing": (lambda folder: describe(folder, spacing_mm=(1.0, 0.0, 1.0)), "spacing"),
    "not a permutation": (lambda folder: describe(folder, transpose_forward=(0, 0, 1)), "permutation"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(tmp_path: Path, name: str) -> None:
    damage, finding = BROKEN[name]
    damage(build_v1_folder(tmp_path))
    with pytest.raises(WeightsBroken) as error:
        loaded(tmp_path)
    assert re.search(finding, str(error.value)), str(error.value)
    assert str(tmp_path) in error.value.where
    assert error.value.do


def test_folds_of_different_models_are_refused(tmp_path: Path) -> None:
    build_v1_folder(tmp_path, V1Spec(folds=("fold_0", "fold_1")))
    other = v1_description(V1Spec(patch=(32, 32, 32)))
    write_pickle(other, tmp_path / "fold_1" / "model_final_checkpoint.model.pkl")
    with pytest.raises(WeightsBroken, match="folds 0 and 1") as error:
        loaded(tmp_path)
    assert "patch (16, 16, 24) and (32, 32, 32)" in error.value.found


def test_gated_mirroring_takes_the_fastest_arithmetic_unless_told_otherwise(tmp_path: Path, monkeypatch) -> None:
    folder, case = build_v1_folder(tmp_path, V1Spec()), small_case((10, 12, 12), (2.0, 2.0, 2.0))

    def arithmetic(**choices: Any) -> str:
        settings = InferenceSettings(**choices)
        member = NnunetV1Member.load(MemberSpec("seals", "seals", folder), settings)
        return member.predict(case, settings, ignore_progress).arithmetic

    has_any = torch.cpu._is_avx512_bf16_supported()
    for fast, gated in ((True, "bf16, OpenVINO" if has_any else "fp32, OpenVINO"), (False, "fp32, OpenVINO")):
        monkeypatch.setattr(sessions, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert arithmetic(tta="gated") == gated
        assert arithmetic(tta="gated", precision="fp32") == arithmetic(tta="none") == "fp32, OpenVINO"
