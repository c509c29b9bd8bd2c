"""What a model folder and a manifest entry may say, and what is refused: each complaint names file, finding and remedy."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import shared
from ensemble.errors import WeightsBroken
from ensemble.families import sessions
from ensemble.families.base import InferenceSettings
from ensemble.families.channels import InputChannel, parse_channel, shift_slices
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.geometry import Grid
from ensemble.inference.engine import NonFiniteLogits
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ignore_progress
from ensemble.volume import Volume
from ensemble.weights.checkpoints import read_checkpoint
from nnunet_folders import FolderSpec, build_folder, small_case

SMALL = FolderSpec(patch=(8, 16, 16), mirror_axes=(2,), strides=((1, 1, 1), (2, 2, 2)))


def load(folder: Path, **manifest: Any) -> NnunetV2Member:
    return NnunetV2Member.load(MemberSpec("small", "nnunet", folder, **manifest), InferenceSettings())


def probability(folder: Path, case: PreparedCase, tta: Any = "mirror", **manifest: Any) -> np.ndarray:
    return load(folder, **manifest).predict(case, InferenceSettings(tta=tta), ignore_progress).probability.array


@pytest.fixture(scope="module")
def case() -> PreparedCase:
    return small_case((12, 24, 20))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_folder(tmp_path, SMALL)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_parameter_names(prefix, folder, case, tmp_path):
    wrapped = build_folder(tmp_path / "wrapped", replace(SMALL, prefix=prefix))
    np.testing.assert_array_equal(probability(wrapped, case), probability(folder, case))


def test_batch_norm_trainer_overrides_the_plans(case, tmp_path):
    in_plans = build_folder(tmp_path / "plans", replace(SMALL, norm="batchnorm.BatchNorm"))
    by_trainer = build_folder(
        tmp_path / "trainer", replace(SMALL, norm="batchnorm.BatchNorm", trainer="nnUNetTrainerBN")
    )
    edit_json(
        by_trainer / "plans.json",
        lambda plans: architecture(plans)["arch_kwargs"].update(norm_op="torch.nn.modules.instancenorm.InstanceNorm3d"),
    )
    np.testing.assert_array_equal(probability(by_trainer, case), probability(in_plans, case))


def test_tta_choices_differ_and_gated_lies_between(folder, case):
    mirrored, plain, gated = (probability(folder, case, tta) for tta in ("mirror", "none", "gated"))
    assert np.abs(mirrored - plain).max() > 1e-3
    assert np.abs(gated - mirrored).mean() <= np.abs(plain - mirrored).mean()


def test_member_says_what_it_needs_and_counts_its_folds(tmp_path, case):
    spec = replace(
        SMALL,
        channels=("FLAIR", "DWI"),
        folds=("0", "2", "all"),
        schemes=("NoNormalization",) * 2,
        use_mask=(False,) * 2,
    )
    member = load(build_folder(tmp_path, spec))
    assert member.name == "small"
    assert member.requires == {Modality.FLAIR, Modality.DWI}
    assert member.predict(case, InferenceSettings(), ignore_progress).networks == 2  # fold_all only where it is alone


def test_networks_stay_loaded_and_cases_do_not_mix(folder, case):
    member, other = load(folder), small_case((9, 30, 18), seed=3)
    before = {modality: volume.array.copy() for modality, volume in case.images.items()}
    first = member.predict(case, InferenceSettings(), ignore_progress).probability.array
    member.predict(other, InferenceSettings(), ignore_progress)
    np.testing.assert_array_equal(member.predict(case, InferenceSettings(), ignore_progress).probability.array, first)
    for modality, volume in case.images.items():
        np.testing.assert_array_equal(volume.array, before[modality])


def test_a_case_thinner_than_a_networks_voxel(tmp_path):
    folder = build_folder(tmp_path, replace(SMALL, spacing_mm=(9.0, 2.0, 2.0)))
    thin = small_case((2, 24, 20))
    assert probability(folder, thin).shape == (2, 24, 20)


def test_progress_ends_at_all_windows(folder, case):
    seen: list[tuple[int, int]] = []
    load(folder).predict(case, InferenceSettings(), lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_physical_intensities_are_taken_when_the_manifest_says_so(folder, case):
    doubled = {modality: volume.like(volume.array**2) for modality, volume in case.images.items()}
    other = replace(case, tissue_normalized=doubled)
    native, physical = probability(folder, other), probability(folder, other, intensities="tissue_normalized")
    np.testing.assert_array_equal(native, probability(folder, case))
    np.testing.assert_array_equal(physical, probability(folder, replace(case, images=doubled)))
    assert np.abs(native - physical).max() > 1e-3


def test_manifest_channels_override_those_of_the_folder(case, tmp_path):
    unnamed = build_folder(tmp_path / "unnamed", replace(SMALL, channels=("noNorm", "whatever")))
    named = build_folder(tmp_path / "named", SMALL)
    np.testing.assert_array_equal(probability(unnamed, case, channels=("DWI", "ADC")), probability(named, case))
    with pytest.raises(WeightsBroken, match="which images"):
        load(unnamed)
    with pytest.raises(WeightsBroken, match="wrong number of channels"):
        load(unnamed, channels=("DWI",))


def test_canonical_orientation_makes_the_prediction_independent_of_the_files_axes(tmp_path):
    """The same head stored with other axes gives the same probability at the same place."""
    folder = build_folder(tmp_path, replace(SMALL, mirror_axes=None))
    straight = small_case((12, 24, 20))
    # x runs to the right, and the array's first axis runs along y
    grid = Grid((20, 12, 24), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), (-1.0, 0, 0, 0, 0, 1.0, 0, 1.0, 0))
    stored = {
        modality: Volume(np.ascontiguousarray(volume.array.transpose(1, 0, 2)[:, :, ::-1]), grid)
        for modality, volume in straight.images.items()
    }
    turned = replace(straight, images=stored, tissue_normalized=stored)
    back = probability(folder, turned, orientation="canonical")[:, :, ::-1].transpose(1, 0, 2)
    np.testing.assert_array_equal(back, probability(folder, straight, orientation="canonical"))
    assert np.abs(probability(folder, turned)[:, :, ::-1].transpose(1, 0, 2) - back).max() > 1e-3


def test_neighbouring_slices_as_channels(tmp_path, case):
    """DWI[-1] and DWI[1] are what shifted copies of the image would be."""
    spec = replace(SMALL, channels=("a", "b"))
    folder = build_folder(tmp_path, spec)
    result = probability(folder, case, channels=("DWI[-1]", "DWI[+1]"))
    dwi = case.images[Modality.DWI]
    before = dwi.like(np.concatenate([dwi.array[:1], dwi.array[:-1]]))
    after = dwi.like(np.concatenate([dwi.array[1:], dwi.array[-1:]]))
    shifted = replace(case, images={Modality.DWI: before, Modality.ADC: after})
    np.testing.assert_array_equal(result, probability(folder, shifted, channels=("DWI", "ADC")))


def test_an_optional_channel_shows_nothing_when_the_image_is_missing(tmp_path, case):
    """FLAIR? without FLAIR is what an empty FLAIR would be, and says so; with it, it is as FLAIR."""
    folder = build_folder(tmp_path, replace(SMALL, channels=("a", "b")))
    optional, needed = load(folder, channels=("DWI", "FLAIR?")), load(folder, channels=("DWI", "FLAIR"))
    assert optional.requires == {Modality.DWI}
    assert needed.requires == {Modality.DWI, Modality.FLAIR}
    flair = case.images[Modality.FLAIR]
    empty = replace(case, images={**case.images, Modality.FLAIR: flair.like(np.zeros_like(flair.array))})
    without = replace(case, images={m: v for m, v in case.images.items() if m is not Modality.FLAIR})
    for member, seen, remark in ((optional, case, ""), (optional, without, "without FLAIR")):
        found = member.predict(seen, InferenceSettings(), ignore_progress)
        expected = needed.predict(case if seen is case else empty, InferenceSettings(), ignore_progress)
        np.testing.assert_array_equal(found.probability.array, expected.probability.array)
        assert found.remark == remark


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DWI", InputChannel(Modality.DWI)),
        ("adc", InputChannel(Modality.ADC)),
        ("Flair", InputChannel(Modality.FLAIR)),
        ("mri_DWI", InputChannel(Modality.DWI)),
        ("ADC_0001", InputChannel(Modality.ADC)),
        ("flair-brain-mri", InputChannel(Modality.FLAIR)),
        ("T2-FLAIR", InputChannel(Modality.FLAIR)),
        ("DWI[-1]", InputChannel(Modality.DWI, -1)),
        ("adc [ +2 ]", InputChannel(Modality.ADC, 2)),
        ("FLAIR[0]", InputChannel(Modality.FLAIR, 0)),
        ("FLAIR?", InputChannel(Modality.FLAIR, optional=True)),
        ("flair[1] ?", InputChannel(Modality.FLAIR, 1, optional=True)),
    ],
)
def test_channel_names(text, expected):
    assert parse_channel(text) == expected


@pytest.mark.parametrize("text", ["", "CT", "DWI[", "DWI[x]", "[1]", "DWI[1][2]", "zscore", "?", "FLAIR??", "FL?AIR"])
def test_unknown_channel_names_are_refused(text):
    with pytest.raises(ValueError, match="is not DWI, ADC or FLAIR"):
        parse_channel(text)


def test_neighbouring_slices_repeat_the_ends():
    array = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((4, 2, 2), np.float32)
    assert shift_slices(array, -2)[:, 0, 0].tolist() == [0, 0, 0, 1]
    assert shift_slices(array, 1)[:, 0, 0].tolist() == [1, 2, 3, 3]
    assert shift_slices(array, 9)[:, 0, 0].tolist() == [3, 3, 3, 3]


# --- what is refused ---


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def architecture(plans: dict[str, Any]) -> dict[str, Any]:
    block: dict[str, Any] = plans["configurations"]["3d_fullres"]["architecture"]
    return block


def configuration(plans: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = plans["configurations"]["3d_fullres"]
    return chosen


BROKEN_PLANS = {
    "no configurations": (lambda p: p.pop("configurations"), "configurations"),
    "another configuration": (lambda p: p.update(configurations={"2d": {}}), "no configuration 3d_fullres"),
    "cascade": (lambda p: configuration(p).update(previous_stage="3d_lowres"), "cascade"),
    "another preprocessor": (lambda p: configuration(p).update(preprocessor_name="Mine"), "preprocessor Mine"),
    "another label manager": (lambda p: p.update(label_manager="Mine"), "label manager Mine"),
    "circular": (lambda p: configuration(p).update(inherits_from="3d_fullres"), "circle"),
    "inherits nothing": (lambda p: configuration(p).update(inherits_from="gone"), "no configuration gone"),
    "no patch": (lambda p: configuration(p).pop("patch_size"), "patch_size"),
    "4-D patch": (lambda p: configuration(p).update(patch_size=[1, 2, 3, 4]), "patch_size has 4 axes"),
    "no spacing": (lambda p: configuration(p).update(spacing=None), "spacing"),
    "spacing of other axes": (lambda p: configuration(p).update(spacing=[1, 1]), "spacing"),
    "negative spacing": (lambda p: configuration(p).update(spacing=[1, 0, 1]), "spacing"),
    "bad transpose": (lambda p: p.update(transpose_forward=[0, 0, 1]), "not a permutation"),
    "unknown reader": (lambda p: p.update(image_reader_writer="Tiff3DIO"), "image_reader_writer"),
    "schemes": (lambda p: configuration(p).update(normalization_schemes=["ZScoreNormalization"]), "1 schemes"),
    "unknown scheme": (lambda p: configuration(p).update(normalization_schemes=["X", "Y"]), "'X' is not one of"),
    "CT without statistics": (
        lambda p: (
            configuration(p).update(normalization_schemes=["CTNormalization"] * 2),
            p.pop("foreground_intensity_properties_per_channel"),
        ),
        "CTNormalization",
    ),
    "unknown resampling": (lambda p: configuration(p).update(resampling_fn_data="f"), "unknown resampling"),
    "code in the network's place": (
        lambda p: architecture(p).update(network_class_name="os.system"),
        "network 'os.system'",
    ),
    "code in a layer's place": (
        lambda p: architecture(p)["arch_kwargs"].update(nonlin="subprocess.Popen"),
        "subprocess.Popen",
    ),
    "unknown argument": (lambda p: architecture(p)["arch_kwargs"].update(magic=1), "no arguments magic"),
    "missing argument": (lambda p: architecture(p)["arch_kwargs"].pop("strides"), "strides"),
    "contradictory arguments": (
        lambda p: architecture(p)["arch_kwargs"].update(n_stages=3),
        "do not describe a network",
    ),
    "too many stages": (lambda p: architecture(p)["arch_kwargs"].update(n_stages=10**9), "n_stages"),
    "too many features": (
        lambda p: architecture(p)["arch_kwargs"].update(features_per_stage=[10**9] * 2),
        "features_per_stage",
    ),
    "no features": (lambda p: architecture(p)["arch_kwargs"].pop("features_per_stage"), "features_per_stage"),
    "features that are no numbers": (
        lambda p: architecture(p)["arch_kwargs"].update(features_per_stage=["six", 12]),
        "features_per_stage",
    ),
    "no stages": (lambda p: architecture(p)["arch_kwargs"].update(features_per_stage=[]), "features_per_stage"),
    "another network": (
        lambda p: architecture(p)["arch_kwargs"].update(features_per_stage=[6, 13]),
        "size mismatch",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_PLANS)
def test_broken_plans(name, folder):
    change, finding = BROKEN_PLANS[name]
    edit_json(folder / "plans.json", change)
    assert_refused(folder, finding)


BROKEN_DATASETS = {
    "no channels": (lambda d: d.pop("channel_names"), "channel_names"),
    "channels without order": (lambda d: d.update(channel_names={"a": "DWI", "b": "ADC"}), "keys a, b"),
    "channel names for another network": (lambda d: d.update(channel_names={"0": "DWI"}), "2 schemes"),
    "no labels": (lambda d: d.pop("labels"), "labels"),
    "no background": (lambda d: d.update(labels={"lesion": 1}), "background 0"),
    "only background": (lambda d: d.update(labels={"background": 0}), "at least one more"),
    "regions": (lambda d: d.update(labels={"background": 0, "whole": [1, 2]}), "regions"),
    "labels that are words": (lambda d: d.update(labels={"background": 0, "lesion": "one"}), "labels"),
    "a class too many": (lambda d: d.update(labels={"background": 0, "a": 1, "b": 2}), "size mismatch"),
}


@pytest.mark.parametrize("name", BROKEN_DATASETS)
def test_broken_datasets(name, folder):
    change, finding = BROKEN_DATASETS[name]
    edit_json(folder / "dataset.json", change)
    assert_refused(folder, finding)


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=lambda content: repr(content)[:9]
)
def test_unreadable_json(file, content, folder):
    path = folder / file
    path.unlink() if content is None else path.write_bytes(content)
    assert file in assert_refused(folder).where


class Hostile:
    """What a pickle can do to who opens it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "pwned"))


def change_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return apply


def poison(content: dict[str, Any]) -> None:
    content["network_weights"]["decoder.seg_layers.0.bias"][0] = float("nan")


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "fold_0"),
    "empty": (lambda path: path.write_bytes(b""), "starts with b''"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "version https://git"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5000]), ""),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ""),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "Tensor"),
    "code": (
        change_checkpoint(lambda c: c.update(logging=Hostile(Path("/tmp/never-written")))),
        "it refers to getattr",
    ),
    "array of objects": (change_checkpoint(lambda c: c.update(x=np.array([{}], dtype=object))), "it refers to numpy"),
    "no weights": (change_checkpoint(lambda c: c.pop("network_weights")), "expected network_weights"),
    "a weight missing": (
        change_checkpoint(lambda c: c["network_weights"].pop("decoder.seg_layers.0.bias")),
        "decoder.seg_layers.0.bias",
    ),
    "a weight too many": (change_checkpoint(lambda c: c["network_weights"].update(x=torch.ones(1))), '"x"'),
    "a weight that is no tensor": (
        change_checkpoint(lambda c: c["network_weights"].update({"decoder.seg_layers.0.bias": [0, 0]})),
        "decoder.seg_layers.0.bias",
    ),
    "not a number": (change_checkpoint(poison), "decoder.seg_layers.0.bias"),
    "impossible mirror axes": (change_checkpoint(lambda c: c.update(inference_allowed_mirroring_axes=(0, 3))), "3"),
    "mirror axes that are no axes": (change_checkpoint(lambda c: c.update(inference_allowed_mirroring_axes=7)), "7"),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_broken_checkpoints(name, folder):
    damage, finding = BROKEN_CHECKPOINTS[name]
    damage(folder / "fold_0" / "checkpoint_final.pth")
    assert_refused(folder, finding)
    assert not Path("/tmp/never-written").exists()


def test_folds_of_different_configurations(tmp_path):
    folder = build_folder(tmp_path, replace(SMALL, folds=("0", "1")))
    change_checkpoint(lambda c: c["init_args"].update(configuration="2d"))(folder / "fold_1" / "checkpoint_final.pth")
    assert_refused(folder, "fold_0: 3d_fullres, fold_1: 2d")


@pytest.mark.parametrize("init_args", [None, {}, [1]])
def test_configuration_by_folder_name_or_as_the_only_one(init_args, folder, case):
    expected = probability(folder, case)
    change_checkpoint(lambda c: c.update(init_args=init_args))(folder / "fold_0" / "checkpoint_final.pth")
    np.testing.assert_array_equal(probability(folder, case), expected)
    edit_json(folder / "plans.json", lambda plans: plans["configurations"].update({"2d": {}}))
    np.testing.assert_array_equal(probability(folder, case), expected)
    assert_refused(folder.rename(folder.with_name("model")), "several configurations (3d_fullres, 2d)")


def test_checkpoint_log_is_read_as_plain_values(folder):
    content = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    assert content["_best_ema"] == 0.55
    assert content["logging"]["mean_fg_dice"] == pytest.approx([0.5, 0.6])
    assert type(content["_best_ema"]) is float


def test_checkpoint_of_numpy_1(tmp_path):
    """numpy 1 pickled its scalars as numpy.core.multiarray.scalar."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save({"a": np.float64(0.25)}, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core", b"numpy.core"))
    assert b"numpy._core" in new.read_bytes()
    assert b"numpy._core" not in old.read_bytes()
    assert read_checkpoint(old) == {"a": 0.25}


def test_checkpoint_of_torch_before_1_6(tmp_path):
    path = tmp_path / "legacy.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(2))


def test_checkpoint_of_nnunet_version_1():
    """Its `plot_stuff` holds numpy scalars; its names carry the prefix of distributed training."""
    found = sorted(shared("golden/seals_v1").rglob("model_final_checkpoint.model"))
    content = read_checkpoint(found[0])
    assert {"epoch", "state_dict", "plot_stuff"} <= set(content)
    assert all(torch.is_tensor(tensor) for tensor in content["state_dict"].values())


def test_weights_that_overflow_are_an_error_not_a_mask(folder, case):
    def overflow(content: dict[str, Any]) -> None:
        for tensor in content["network_weights"].values():
            tensor.fill_(1e30)

    change_checkpoint(overflow)(folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(NonFiniteLogits):
        probability(folder, case)


def assert_refused(folder: Path, finding: str = "") -> WeightsBroken:
    with pytest.raises(WeightsBroken) as caught:
        load(folder)
    error = caught.value
    assert error.what
    assert str(folder) in error.where
    assert finding in str(error)
    assert error.found
    return error


@pytest.mark.parametrize("norm", ["batchnorm.BatchNorm", FolderSpec.norm])
def test_gated_mirroring_takes_the_fastest_arithmetic_unless_told_otherwise(tmp_path, monkeypatch, norm):
    """Only where the processor multiplies bfloat16 faster. Chosen when networks are loaded."""
    folder = build_folder(tmp_path, FolderSpec(norm=norm))
    asked = []
    monkeypatch.setattr(
        sessions, "open_openvino_session", lambda network, channels, window, precision, tap: asked.append(precision)
    )
    for fast, gated in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(sessions, "has_fast_bfloat16", lambda device, fast=fast: fast)
        for settings, expected in (
            (InferenceSettings(tta="gated"), gated),
            (InferenceSettings(tta="gated", precision="fp32"), "fp32"),
            (InferenceSettings(), "fp32"),
            (InferenceSettings(tta="none"), "fp32"),
        ):
            member = NnunetV2Member.load(MemberSpec("m", "nnunet", folder), settings)
            assert asked.pop() == expected
            assert member.sessions[0].arithmetic == "fp32"  # PyTorch, where OpenVINO can't
