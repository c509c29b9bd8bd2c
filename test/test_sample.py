"""The shipped members on the sample case, and on real cases where there are some: what a user sees after `git clone`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import SAMPLE, shared, tree
from ensemble.cli import main
from ensemble.metrics import dice
from ensemble.readers.names import stem
from ensemble.types import AnyArray, Modality
from ensemble.volume import grid_of

IMAGES = SAMPLE / "input" / "images"


def sample(modality: Modality) -> Path:
    return next((IMAGES / f"{modality}-brain-mri").glob("*.mha"))


def voxels(path: Path) -> AnyArray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.slow
def test_the_sample_case_through_the_contract(tmp_path: Path) -> None:
    assert (
        main(["--input", str(SAMPLE / "input"), "--output", str(tmp_path / "out"), "--device", "cpu", "--report"]) == 0
    )
    mask = tmp_path / "out" / "images" / "stroke-lesion-segmentation" / sample(Modality.DWI).name
    truth = SAMPLE / "truth" / sample(Modality.DWI).name
    assert dice(voxels(truth), voxels(mask)) > 0.7
    assert grid_of(sitk.ReadImage(str(mask))) == grid_of(sitk.ReadImage(str(sample(Modality.DWI))))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [member["status"] for member in report["members"]] == ["voted"] * 3


@pytest.mark.slow
def test_without_flair_every_member_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--dwi", str(sample(Modality.DWI)), "--adc", str(sample(Modality.ADC)), "--out", str(tmp_path)]
    assert main(["run", *files, "--device", "cpu", "--tta", "none"]) == 0
    members = json.loads((tmp_path / "report.json").read_text())["members"]
    assert {member["name"]: (member["status"], member.get("reason")) for member in members} == {
        "iso3d": ("voted", None),
        "slice2d": ("voted", None),
        "flair3d": ("voted", "without FLAIR"),
    }
    assert "(without FLAIR)" in capsys.readouterr().out


def shifted_axes(source: Path, target: Path, order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Path:
    """The same voxels in the same places of the world, stored in another axis order and direction."""
    sitk.WriteImage(sitk.Flip(sitk.PermuteAxes(sitk.ReadImage(str(source)), order), flips, False), str(target))
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("order", "flips"), [((1, 2, 0), (True, False, False)), ((2, 0, 1), (False, True, True))])
def test_the_axis_order_of_the_files_does_not_matter(
    tmp_path: Path, order: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    common = ["--device", "cpu", "--tta", "none", "--members", "iso3d,slice2d", "--format", "mha"]
    for name, arrange in (("as it is", False), ("turned", True)):
        files = []
        for modality in (Modality.DWI, Modality.ADC):
            path = sample(modality)
            if arrange:
                path = shifted_axes(path, tmp_path / f"{modality}.mha", order, flips)
            files += [f"--{modality}", str(path)]
        assert main(["run", *files, "--out", str(tmp_path / name), *common]) == 0
    back = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "turned" / "mask.mha")), sitk.ReadImage(str(sample(Modality.DWI))), sitk.Transform(),
        sitk.sitkNearestNeighbor,
    )  # fmt: skip
    straight = voxels(tmp_path / "as it is" / "mask.mha")
    assert straight.any()
    assert dice(straight, sitk.GetArrayFromImage(back)) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(("case", "least"), [("isles22_0002", 0.75), ("isles22_0003", 0.8), ("isles22_0009", 0.65)])
def test_real_lesions_are_found_and_files_and_contract_agree(tmp_path: Path, case: str, least: float) -> None:
    folder = shared(f"cases/{case}")
    given = {m: folder / f"{m}.nii.gz" for m in Modality if (folder / f"{m}.nii.gz").is_file()}
    common = ["--device", "cpu", "--tta", "none"]
    files = [item for modality, path in given.items() for item in (f"--{modality}", str(path))]
    assert main(["run", *files, "--out", str(tmp_path / "run"), "--format", "mha", *common]) == 0
    for modality, path in given.items():
        target = tmp_path / "in" / "images" / f"{modality}-brain-mri" / f"{stem(path)}.mha"
        target.parent.mkdir(parents=True)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(target))
    before = tree(tmp_path / "in")
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *common]) == 0
    assert tree(tmp_path / "in") == before
    mask = voxels(tmp_path / "run" / "mask.mha")
    assert np.array_equal(mask, voxels(tmp_path / "out" / "images" / "stroke-lesion-segmentation" / "dwi.mha"))
    assert dice(voxels(folder / "lesion_gt.nii.gz"), mask) > least
