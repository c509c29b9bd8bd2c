"""Packed members: same prediction, no pickle, recognised wherever they lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import shared, tree
from ensemble.cli import main
from ensemble.config import SHIPPED_WEIGHTS
from ensemble.errors import UsageError, WeightsBroken
from ensemble.families.base import InferenceSettings, Member
from ensemble.families.spec import MemberSpec
from ensemble.members.manifest import find_members, open_member
from ensemble.members.pack import pack_members
from ensemble.types import AnyArray, ignore_progress
from ensemble.weights.packed import read_packed, write_packed
from nnunet_folders import FolderSpec, build_folder, small_case
from nnunet_v1_folders import PUBLISHED, V1Spec, build_v1_folder

SETTINGS = InferenceSettings(tta="none")
CASE = small_case((14, 22, 18), (2.0, 2.0, 2.0))
#: Bound on what fp16 kernels may change in any probability: measured 1.6e-3 here, 5e-4 on the trained SEALS network of the golden case,
#: nothing in the shipped members, whose checkpoints hold float16 already.
FP16_CLOSENESS = 0.01


def opened(weights: Path, settings: InferenceSettings = SETTINGS) -> Member:
    (spec,) = find_members(weights)
    return open_member(spec, settings)


def probability(member: Member) -> AnyArray:
    return member.predict(CASE, SETTINGS, ignore_progress).probability.array


def source_folder(kind: str, root: Path) -> Path:
    if kind == "seals":
        return build_v1_folder(root / PUBLISHED, V1Spec(folds=("fold_0", "fold_2")))
    if kind == "residual":
        return build_folder(root, FolderSpec(network="ResidualEncoderUNet", folds=("0", "1")))
    return build_folder(root, FolderSpec(folds=("0", "1"), prefix="_orig_mod.", mirror_axes=(1, 2)))


KINDS = ("nnunet", "residual", "seals")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    source = source_folder(kind, tmp_path / "a")
    assert pack_members(source, tmp_path / "b", "fp32") == [tmp_path / "b"]
    original, packed = opened(tmp_path / "a"), opened(tmp_path / "b")
    np.testing.assert_array_equal(probability(packed), probability(original))
    assert (packed.name, packed.requires) == (original.name, original.requires)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_is_close_and_half_the_size(tmp_path: Path, kind: str) -> None:
    source = source_folder(kind, tmp_path / "a")
    pack_members(source, tmp_path / "fp16", "fp16")
    pack_members(source, tmp_path / "fp32", "fp32")
    difference = np.abs(probability(opened(tmp_path / "fp16")) - probability(opened(tmp_path / "a"))).max()
    assert 0 < difference < FP16_CLOSENESS
    small, large = (
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*.safetensors")) for name in ("fp16", "fp32")
    )
    assert small < 0.75 * large  # the tests' networks are so small that their tables of names count


def test_v2_settings_of_a_fold_survive(tmp_path: Path) -> None:
    pack_members(source_folder("nnunet", tmp_path / "a"), tmp_path / "b", "fp32")
    original, packed = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert packed.mirror_axes == original.mirror_axes == (1, 2)  # type: ignore[attr-defined]
    assert packed.plans == original.plans  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_is_left(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_members(source_folder(kind, tmp_path / "a"), tmp_path / "b", "fp32")
    assert {path.suffix for path in (tmp_path / "b").rglob("*") if path.is_file()} == {".json", ".safetensors"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is read")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    probability(opened(tmp_path / "b"))


def test_a_weights_folder_is_packed_member_by_member(tmp_path: Path) -> None:
    source_folder("seals", tmp_path / "a")
    source_folder("nnunet", tmp_path / "a" / "mine")
    names = [spec.name for spec in find_members(tmp_path / "a")]
    assert len(pack_members(tmp_path / "a", tmp_path / "b", "fp32")) == 2
    assert sorted(spec.name for spec in find_members(tmp_path / "b")) == sorted(names)
    assert pack_members(tmp_path / "a", tmp_path / "c", "fp32", ("seals",)) == [tmp_path / "c" / "seals"]


def test_a_manifest_keeps_what_it_says(tmp_path: Path) -> None:
    """Also of a folder that is packed on its own, and in a manifest that says nothing but where the packed folder is."""
    build_folder(tmp_path / "a")
    folder = next((tmp_path / "a").iterdir())
    entry = {
        "name": "x",
        "kind": "nnunet",
        "folder": folder.name,
        "channels": ["ADC", "DWI[+1]"],
        "intensities": "tissue_normalized",
    }
    manifest = {"members": [entry | {"licence": "CC0-1.0", "orientation": "canonical"}]}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    pack_members(folder, tmp_path / "b" / "packed", "fp32")
    (tmp_path / "b" / "manifest.json").write_text(
        json.dumps({"members": [{"name": "y", "kind": "nnunet", "folder": "packed"}]})
    )
    (spec,) = find_members(tmp_path / "b")
    assert (spec.name, spec.channels) == ("y", ("ADC", "DWI[+1]"))
    assert (spec.intensities, spec.orientation, spec.licence) == ("tissue_normalized", "canonical", "CC0-1.0")
    (expected,) = find_members(tmp_path / "a")
    np.testing.assert_array_equal(
        probability(open_member(spec, SETTINGS)), probability(open_member(expected, SETTINGS))
    )


def shipped() -> tuple[MemberSpec, ...]:
    try:
        return find_members(SHIPPED_WEIGHTS)
    except WeightsBroken:
        return ()


@pytest.mark.slow
@pytest.mark.parametrize("spec", shipped(), ids=lambda spec: spec.name)
def test_the_shipped_members(tmp_path: Path, spec: MemberSpec) -> None:
    pack_members(spec.folder, tmp_path / "fp32", "fp32")
    pack_members(spec.folder, tmp_path / "fp16", "fp16")
    (packed,) = find_members(tmp_path / "fp32")
    assert (packed.name, packed.channels, packed.intensities) == (spec.name, spec.channels, spec.intensities)
    expected = probability(open_member(spec, SETTINGS))
    np.testing.assert_array_equal(probability(opened(tmp_path / "fp32")), expected)
    assert np.abs(probability(opened(tmp_path / "fp16")) - expected).max() < FP16_CLOSENESS


def test_published_seals_weights(tmp_path: Path) -> None:
    """Packed without optimizer states; the networks are the same to the bit."""
    source = shared("golden/seals_v1/weights")
    pack_members(source, tmp_path, "fp32")
    in_torch = replace(SETTINGS, session="torch")
    original, packed = opened(source, in_torch), opened(tmp_path, in_torch)
    for mine, theirs in zip(packed.sessions, original.sessions, strict=True):  # type: ignore[attr-defined]
        expected = theirs.network.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.network.state_dict().items())


# --- what goes wrong -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nnunet", "seals"])
def test_damage_to_a_packed_member_is_noticed(tmp_path: Path, kind: str) -> None:
    pack_members(source_folder(kind, tmp_path / "a"), tmp_path / "b", "fp32")
    weights = next((tmp_path / "b").rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        opened(tmp_path / "b")
    entry = json.loads((tmp_path / "b" / "member.json").read_text())
    (tmp_path / "b" / "member.json").write_text(json.dumps(entry | {"sha256": {}}))
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(WeightsBroken, match="is damaged") as error:
            opened(tmp_path / "b")
        assert str(weights) == error.value.where


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": "a"}', '{"name": "a", "kind": "seals", "intensities": "x"}']
)
def test_a_broken_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "member.json").write_text(text)
    with pytest.raises(WeightsBroken, match="description of a packed member"):
        find_members(tmp_path)


def test_a_broken_plans_file(tmp_path: Path) -> None:
    pack_members(source_folder("seals", tmp_path / "a"), tmp_path / "b", "fp32")
    entry = json.loads((tmp_path / "b" / "member.json").read_text())
    (tmp_path / "b" / "member.json").write_text(json.dumps(entry | {"sha256": {}}))
    for text in ("", "[]", "{}"):
        (tmp_path / "b" / "plans.json").write_text(text)
        with pytest.raises(WeightsBroken, match="does not describe a supported model"):
            opened(tmp_path / "b")


def test_nothing_is_left_when_packing_fails(tmp_path: Path) -> None:
    source = source_folder("seals", tmp_path / "a")
    (source / "fold_2" / "model_final_checkpoint.model").write_bytes(b"broken")
    before = tree(tmp_path)
    with pytest.raises(WeightsBroken, match="damaged"):
        pack_members(source, tmp_path / "b", "fp32")
    assert tree(tmp_path) == before


def test_a_destination_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = source_folder("seals", tmp_path / "a")
    before = tree(tmp_path)
    for destination in (tmp_path, source):
        with pytest.raises(UsageError, match="new or empty"):
            pack_members(source, destination, "fp32")
    assert tree(tmp_path) == before


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    large = {"kernel": torch.full((2, 2), 1e5)}
    with pytest.raises(WeightsBroken, match="are too large for fp16"):
        write_packed(tmp_path / "a.safetensors", large, {}, "fp16")
    with pytest.raises(WeightsBroken, match="contain NaN or infinite values"):
        write_packed(tmp_path / "a.safetensors", {"kernel": torch.full((2, 2), torch.nan)}, {}, "fp16")
    write_packed(tmp_path / "a.safetensors", large, {"key": "text"}, "fp32")
    tensors, metadata = read_packed(tmp_path / "a.safetensors")
    assert torch.equal(tensors["kernel"], large["kernel"])
    assert metadata == {"key": "text"}


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    weights = {"a": base, "b": base, "c": base.transpose(0, 2), "d": base[0], "e": torch.tensor(3)}
    write_packed(tmp_path / "a.safetensors", weights, {}, "fp32")
    tensors, metadata = read_packed(tmp_path / "a.safetensors")
    assert metadata == {}
    assert set(tensors) == set(weights)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in weights.items())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_folder("seals", tmp_path / "a")
    assert main(["members", "pack", str(source), str(tmp_path / "b"), "--precision", "fp16"]) == 0
    assert f"packed: {tmp_path / 'b'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "member.json").read_text())["precision"] == "fp16"
    assert main(["members", "check", "--weights", str(tmp_path / "b"), "--device", "cpu"]) == 0
    assert "files unaltered" in capsys.readouterr().out
    for arguments in (["pack"], ["pack", "a"], ["list", "a"], ["check", "a", "b"]):
        assert main(["members", *arguments]) == 2
