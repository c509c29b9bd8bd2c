"""`inspect`: what a path holds, what would be read of it, and why not more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import ensemble.readers.dicom.read
from conftest import GRID, phantom_arrays, write_image
from dicom_files import whole, write_enhanced, write_series
from ensemble.cli import main
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.types import Modality
from ensemble.volume import Volume, from_sitk

DWI, ADC = Modality.DWI, Modality.ADC
ARRAYS = phantom_arrays()
IMAGES = {modality: Volume(ARRAYS[modality], GRID) for modality in (DWI, ADC)}


@pytest.fixture
def examination(tmp_path: Path) -> Path:
    """b0 and b1000 in one series, ADC, FA, a damaged FLAIR."""
    folder = tmp_path / "examination"
    write_enhanced(
        [(0, Volume(3 * ARRAYS[DWI], GRID)), (1000, IMAGES[DWI])],
        folder / "a" / "1",
        description="diff",
        change=lambda dataset: setattr(dataset, "SeriesNumber", 4),
    )
    write_series(IMAGES[ADC], folder / "b", description="diff_ADC", uid="2")
    write_series(IMAGES[ADC], folder / "c", description="diff_FA", uid="3")
    for path in write_series(IMAGES[ADC], folder / "d", description="t2_flair", uid="4")[5:6]:
        path.unlink()
    return folder


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["inspect", *arguments])
    out, errors = capfd.readouterr()
    assert (errors == "") == (code == 0)
    return code, out


def test_every_series_is_shown_with_what_becomes_of_it(examination: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out = said(capfd, str(examination))
    assert code == 0
    lines = out.splitlines()
    (dwi,) = [line for line in lines if line.split()[:2] == ["DWI", "4"]]
    assert "0, 1000" in dwi
    assert "40 x 48 x 24 voxels" in dwi
    assert any(line.split()[:2] == ["ADC", "diff_ADC"] for line in lines)
    assert "fractional anisotropy" in out
    assert "FLAIR: refused: the FLAIR series lacks slices" in out
    assert "not used" in out


def test_the_same_as_json(examination: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out = said(capfd, str(examination), "--json")
    found = json.loads(out)
    assert code == 0
    by_name = {series["description"]: series for series in found["series"]}
    assert by_name["diff"]["chosen_for"] == ["dwi"]
    assert by_name["diff"]["b_values"] == [0, 1000]
    assert by_name["diff_FA"]["not_taken"] == dict.fromkeys(("dwi", "adc", "flair"), "fractional anisotropy")
    assert "lacks slices" in by_name["t2_flair"]["problem"]
    assert "lacks slices" in found["images"]["flair"]["refused"]["what"]
    assert found["images"]["adc"]["grid"]["size"] == [40, 48, 24]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_write_saves_what_would_be_segmented(examination: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"dwi{suffix}"
    assert main(["inspect", str(examination), "--as", "dwi", "--write", str(path)]) == 0
    written, read = from_sitk(sitk.ReadImage(str(path))), read_image(examination, DWI).volume
    assert np.array_equal(written.array, read.array)
    assert written.grid.distance_voxels(read.grid) < 1e-4
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_was_asked_for_and_cannot_be_read_is_exit_3(
    examination: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out = said(capfd, str(examination), "--as", "flair", "--write", str(tmp_path / "x.nii"))
    assert code == 3
    assert "lacks slices" in out
    assert not (tmp_path / "x.nii").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 3, "does not exist"),
        (["nowhere.zip"], 3, "does not exist"),
        (["{}", "--write", "x.nii"], 2, "--as"),
        (["{}", "--as", "dwi", "--write", "x.png"], 2, "written in this format"),
        (["{}", "--as", "t1"], 2, "invalid choice"),
    ],
)
def test_mistakes(
    examination: Path, arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    got, out = said(capfd, *(argument.format(examination) for argument in arguments))
    assert (got, message in out) == (code, True), out


@pytest.mark.parametrize("kind", ["no archive", "empty folder", "nowhere"])
def test_json_stands_alone_where_nothing_can_be_read(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / {"no archive": "a.zip", "empty folder": "a", "nowhere": "b.zip"}[kind]
    if kind == "no archive":
        path.write_text("x")
    elif kind == "empty folder":
        path.mkdir()
    for arguments in ([], ["--as", "adc"]):
        code, out = said(capfd, str(path), "--json", *arguments)
        assert code == 3
        assert json.loads(out)["images"]["adc"]["refused"]["where"] == str(path)


@pytest.mark.parametrize("name", ["x.png", "missing/../x.mhd", "folder.nii.gz"])
def test_what_cannot_be_written_is_an_error_alone(
    examination: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    code, out = said(capfd, str(examination), "--as", "dwi", "--json", "--write", str(tmp_path / name))
    assert code == 2
    assert out.startswith("error: ")


def test_an_image_is_not_replaced_by_what_is_read_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_image(ARRAYS[DWI], tmp_path / "x.nii.gz")
    (tmp_path / "y.nii.gz").symlink_to(path)
    before = path.read_bytes()
    for name in ("x.nii.gz", "y.nii.gz"):
        code, out = said(capfd, str(path), "--as", "dwi", "--write", str(tmp_path / name))
        assert (code, "would overwrite" in out) == (2, True)
    assert path.read_bytes() == before


def test_image_files_are_looked_into_as_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.nii.gz"
    stacked = sitk.JoinSeries([sitk.GetImageFromArray(ARRAYS[DWI] * scale) for scale in (3, 1)])
    sitk.WriteImage(stacked, str(path))
    path.with_name("x.bval").write_text("0 1000")
    code, out = said(capfd, str(path))
    assert code == 0
    assert "volume 2 of 2, b = 1000" in out
    assert said(capfd, str(path), "--as", "adc")[0] == 3
    assert said(capfd, str(path), "--as", "dwi", "--write", str(tmp_path / "y.mha"))[0] == 0
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "y.mha"))), ARRAYS[DWI])


def test_values_that_are_no_numbers_are_saved_as_they_are(tmp_path: Path) -> None:
    array = ARRAYS[DWI].copy()
    array[0, 0, 0] = np.nan
    path = write_image(array, tmp_path / "x.mha")
    assert main(["inspect", str(path), "--as", "dwi", "--write", str(tmp_path / "y.mha")]) == 0


def test_headers_of_one_folder_are_read_once_for_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(IMAGES[DWI], tmp_path, description="diff", uid="1", b=1000)
    write_series(IMAGES[ADC], tmp_path, description="diff_ADC", uid="2")
    read: list[Path] = []
    header = ensemble.readers.dicom.read.read_header
    monkeypatch.setattr(ensemble.readers.dicom.read, "read_header", lambda path: read.append(path) or header(path))
    case = read_case_files("x", {DWI: tmp_path, ADC: tmp_path})
    assert len(read) == 48
    assert np.array_equal(case.images[ADC].volume.array, whole(ARRAYS[ADC]))
