"""`members check --compare`: nnU-Net's own predictor beside ours, member by member."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_contract_case
from ensemble.batch.find import find_only_case
from ensemble.cli import main
from ensemble.errors import InputRefused
from ensemble.families.nnunet_v2 import reference
from nnunet_folders import FolderSpec, build_folder

COARSE = FolderSpec(spacing_mm=(6.0, 6.0, 6.0), patch=(8, 16, 16), mirror_axes=None)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return write_contract_case(tmp_path / "case")


@pytest.fixture
def members(tmp_path: Path) -> Path:
    build_folder(tmp_path / "weights" / "coarse", COARSE)
    return tmp_path / "weights"


def check(weights: Path, case: Path, *options: str) -> int:
    return main(["members", "check", "--weights", str(weights), "--compare", str(case), "--tta", "none", *options])


@pytest.mark.slow
def test_our_members_give_what_nnunet_gives(members: Path, case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(members, case) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "mask Dice" in line]
    assert line.startswith("coarse")
    assert "compared with nnunetv2 " in line
    assert float(line.split("mask Dice ")[1].split(",")[0]) >= 0.999
    assert float(line.split("probabilities ")[1]) < 0.05  # it adds up windows in float16
    assert "differ by more" not in said


class Stub:
    """In the place of nnUNetPredictor: a mask of nothing, and what it was given."""

    given: Any = None

    def __init__(self, **options: Any) -> None:
        Stub.given = options

    def initialize_from_trained_model_folder(self, folder: str, folds: list[str]) -> None:
        import torch

        Stub.given |= {"folds": folds}
        for fold in folds:  # nothing but plain values and tensors, so that nothing can run
            torch.load(Path(folder) / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)

    def predict_single_npy_array(self, images: Any, properties: Any, *_: Any) -> tuple[None, Any]:
        return None, np.stack([np.ones(images.shape[1:], np.float32), np.zeros(images.shape[1:], np.float32)])


def test_a_difference_is_told(
    members: Path, case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.NnunetV2Reference, "installed", lambda: reference.NnunetV2Reference(Stub, "stub 1"))
    assert check(members, case) == 0
    said = capsys.readouterr().out
    assert ": compared with stub 1 on case: mask Dice 0.00000" in said
    assert "differ by more than rounding errors" in said
    assert Stub.given["folds"] == ["0"]
    assert Stub.given["use_mirroring"] is False


def test_packed_members_are_compared_too(
    members: Path, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference.NnunetV2Reference, "installed", lambda: reference.NnunetV2Reference(Stub, "stub 1"))
    assert main(["members", "pack", str(members), str(tmp_path / "packed")]) == 0
    assert check(tmp_path / "packed", case) == 0
    assert "compared with stub 1" in capsys.readouterr().out


def test_without_nnunet_it_says_so(
    members: Path, case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    assert check(members, case) == 2
    word = capsys.readouterr().err
    assert "nnU-Net, which is not installed" in word
    assert "pip install nnunetv2" in word


def test_members_of_other_kinds_are_named(
    tmp_path: Path, case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble.outputs.report.members.open_member", lambda *_: None)
    folder = tmp_path / "v1"
    (folder / "x").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"members": [{"name": "old", "kind": "seals", "folder": "x"}]}')
    assert check(folder, case) == 2
    word = capsys.readouterr().err
    assert "supports only nnU-Net v2" in word
    assert "old is of kind seals" in word


def test_only_check_compares(members: Path, case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["members", "list", "--weights", str(members), "--compare", str(case)]) == 2
    assert "members check --compare" in capsys.readouterr().err


def test_the_case_must_be_one(tmp_path: Path, case: Path) -> None:
    assert find_only_case(case)[0] == "case"
    with pytest.raises(InputRefused):
        find_only_case(tmp_path / "none")
    write_contract_case(tmp_path / "two" / "a")
    write_contract_case(tmp_path / "two" / "b")
    with pytest.raises(InputRefused, match="several cases"):
        find_only_case(tmp_path / "two")
    next((case / "images" / "adc-brain-mri").iterdir()).unlink()
    with pytest.raises(InputRefused, match="ADC"):
        find_only_case(case)
