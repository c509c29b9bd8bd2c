"""Weights folders without a manifest: DeepISLES' archive, nnU-Net folders of both versions, packed members."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from conftest import phantom_case
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import WeightsBroken
from ensemble.members.listing import describe_member
from ensemble.members.manifest import find_members, find_unsupported
from ensemble.members.pack import pack_members
from ensemble.pipeline import load_from_config, segment_raw
from ensemble.progress import SilentWatcher
from nnunet_folders import build_folder
from nnunet_v1_folders import PUBLISHED, V1Spec, build_v1_folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """DeepISLES' `weights/` as published, with tiny networks; NVAUTO's are in test_member_nvauto.py."""
    root = tmp_path / "weights"
    build_v1_folder(root / PUBLISHED, V1Spec(folds=tuple(f"fold_{i}" for i in range(5)), modalities={0: "a", 1: "b"}))
    for model in ("factorizer", "resunet"):
        for fold in range(5):
            touch(root / "FACTORIZER" / "logs" / model / f"fold{fold}" / "checkpoints" / "epoch=9.ckpt")
    return root


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("depth", [".", "..", "SEALS", "SEALS/nnUNet_trained_models/nnUNet"])
def test_the_published_archive_is_recognised(archive: Path, depth: str) -> None:
    (spec,) = find_members((archive / depth).resolve())
    assert (spec.name, spec.kind, spec.folder) == ("seals", "seals", archive.resolve() / PUBLISHED)
    assert spec.channels == ("DWI", "ADC")  # whatever its plans call them


def test_what_cannot_vote_is_named(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    unsupported = {other.name: other.what for other in find_unsupported(archive)}
    assert unsupported == {"FACTORIZER": "10 Lightning checkpoints in other folders than SWAN's"}
    with caplog.at_level(logging.WARNING, "ensemble"):
        load_from_config(RunConfig(weights=archive, device="cpu"))
    assert all(f"does not vote: {name}" in caplog.text for name in unsupported)
    shutil.rmtree(archive / "SEALS")
    with pytest.raises(WeightsBroken, match="no recognised member") as error:
        find_members(archive)
    assert "FACTORIZER (not supported yet)" in error.value.found


def test_members_list_shows_what_was_found(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["members", "list", "--weights", str(archive)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["name", "kind", "folds", "images", "spacing", "intensities", "licence", "size"]
    assert lines[2].split()[:7] == ["seals", "seals", "0-4", "DWI,ADC", "1x1x1", "mm", "native"]
    assert "not stated" in lines[2]
    assert "MB" in lines[2]
    assert [line.split(":")[0].strip() for line in lines[3:]] == ["not supported yet, does not vote"]


def test_members_check_says_what_is_missing_and_goes_on(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_folder(archive / "mine")
    lost = archive / PUBLISHED / "fold_3" / "model_final_checkpoint.model"
    lost.unlink()
    assert main(["members", "check", "--weights", str(archive), "--device", "cpu"]) == 4
    said = capsys.readouterr().out
    assert "seals: broken\n  a fold has no model_final_checkpoint.model" in said
    assert str(lost.parent) in said
    assert "3d_fullres: ok, loaded in" in said
    assert "1 of 2 members are broken" in said
    shutil.rmtree(lost.parent)
    assert main(["members", "check", "--weights", str(archive), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "0,1,2,4" in said
    assert "! seals: without fold 3" in said
    assert "all loaded" in said


@pytest.mark.slow
def test_a_case_runs_on_the_archive(tmp_path: Path) -> None:
    build_v1_folder(tmp_path / PUBLISHED, V1Spec(folds=("fold_0", "fold_1"), features=2, patch=(64, 96, 80)))
    ensemble = load_from_config(RunConfig(weights=tmp_path, device="cpu", tta="none"))
    result = segment_raw(phantom_case(), ensemble, SilentWatcher())
    assert [(outcome.member, outcome.status) for outcome in result.outcomes] == [("seals", "voted")]
    prediction = result.outcomes[0].prediction
    assert prediction is not None
    assert prediction.networks == 2


def test_v1_folders_elsewhere_go_by_their_path(tmp_path: Path) -> None:
    task = Path("nnUNet_trained_models/nnUNet/3d_fullres/Task500_Mine/nnUNetTrainerV2__nnUNetPlansv2.1")
    build_v1_folder(tmp_path / task)
    build_v1_folder(tmp_path / "nnUNet_trained_models/nnUNet/2d/Task500_Mine/nnUNetTrainerV2__nnUNetPlansv2.1")
    (spec,) = find_members(tmp_path)
    assert (spec.name, spec.kind, spec.channels) == (task.as_posix().replace("/", "__"), "seals", None)
    (other,) = find_unsupported(tmp_path)
    assert other.what == "nnU-Net v1, 2d"
    assert [spec.name for spec in find_members(tmp_path / task)] == ["nnUNetTrainerV2__nnUNetPlansv2.1"]


def test_two_published_folders_keep_apart(archive: Path) -> None:
    shutil.copytree(archive / "SEALS", archive / "second" / "SEALS")
    names = [spec.name for spec in find_members(archive)]
    assert len(set(names)) == 2
    assert all(PUBLISHED.name in name for name in names)


def test_a_folder_that_lost_all_weights_is_still_a_member(archive: Path) -> None:
    """It must fail loudly, not vanish."""
    for path in archive.rglob("*.model"):
        path.unlink()
    (spec,) = find_members(archive)
    assert spec.name == "seals"
    description = describe_member(spec)
    assert description.folds == ("0", "1", "2", "3", "4")
    assert "no model_final_checkpoint.model" in description.remarks[0]


def test_members_of_all_kinds_side_by_side(archive: Path) -> None:
    build_folder(archive / "mine")
    pack_members(archive / PUBLISHED, archive / "packed", "fp32")
    assert [spec.kind for spec in find_members(archive)] == ["seals", "nnunet", "seals"]


def test_descriptions(tmp_path: Path) -> None:
    build_folder(tmp_path)
    (spec,) = find_members(tmp_path)
    description = describe_member(spec)
    assert description.folds == ("0",)
    assert description.images == ("DWI", "ADC")
    assert description.spacing_mm == (2.0, 2.0, 2.0)
    assert description.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert not description.remarks
