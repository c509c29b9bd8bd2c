"""A whole examination in, mask and objects out: as a command, and as a module of mercure."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from conftest import GRID, StubMember, phantom_arrays, tree, write_final_error_line
from dicom_files import edited, write_enhanced, write_series
from ensemble import pipeline
from ensemble.cli import main
from ensemble.pipeline import Ensemble
from ensemble.types import Modality
from ensemble.volume import Volume

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
OBJECTS = {"segmentation.dcm", "measurements.dcm", "picture.dcm"}
ARRAYS = phantom_arrays()
ADC_TYPE = "DERIVED\\PRIMARY\\DIFFUSION\\ADC"


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch, stub_ensemble: Callable[..., Ensemble]) -> None:
    """Every command has members that need no weights."""
    for name in ("MERCURE_IN_DIR", "MERCURE_OUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        pipeline,
        "load_from_config",
        lambda config: replace(stub_ensemble(StubMember("a"), StubMember("b")), config=config),
    )


def write_examination(root: Path, *, adc: bool = True, flair: bool = True) -> Path:
    """A phantom's examination: b0 and b1000, ADC, FLAIR, a localizer, a map that must not be taken, a text file."""
    dwi = Volume(ARRAYS[DWI], GRID)
    write_series(Volume(ARRAYS[DWI] * 2.2266, GRID), root / "1", uid="1", description="ep2d_diff", b=0)
    write_series(dwi, root / "1", uid="1", description="ep2d_diff", b=1000, first=101)
    if adc:
        write_series(
            Volume(ARRAYS[ADC], GRID),
            root / "2",
            uid="2",
            description="ep2d_diff_ADC",
            image_type=ADC_TYPE,
        )
    if flair:
        write_series(Volume(ARRAYS[DWI] * 0.5, GRID), root / "3", uid="3", description="t2_tirm_flair")
    write_series(dwi, root / "4", uid="4", description="localizer", image_type="ORIGINAL\\PRIMARY\\LOCALIZER")
    write_series(dwi, root / "5", uid="5", description="ep2d_diff_FA", image_type="DERIVED\\PRIMARY\\DIFFUSION\\FA")
    (root / "task.json").write_text('{"id": "x"}')
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in filter(Path.is_file, folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def study(*arguments: object) -> int:
    return main(["study", *map(str, arguments), "--skull-strip", "never"])


@pytest.mark.parametrize("packed", [False, True])
def test_an_examination_becomes_mask_page_and_objects_and_says_why_these_series(tmp_path: Path, packed: bool) -> None:
    given = write_examination(tmp_path / "exam")
    given = zipped(given, tmp_path / "exam.zip") if packed else given
    assert study(given, tmp_path / "out") == 0
    assert set(tree(tmp_path / "out")) == {"mask.nii.gz", "overlay.png", "report.html", "report.json", *OBJECTS}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["case"]["files"]) == {"dwi", "adc", "flair"}
    series = {entry["description"]: entry for entry in report["examination"]["series"]}
    assert {"ep2d_diff", "ep2d_diff_ADC", "t2_tirm_flair", "localizer", "ep2d_diff_FA"} == set(series)
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "mask.nii.gz")))
    assert mask.any()
    segmentation = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    assert np.array_equal(segmentation.pixel_array, mask)
    assert segmentation.StudyInstanceUID == "1.2.3"


def test_without_adc_it_is_computed_and_a_flair_that_cannot_be_told_is_left_out(tmp_path: Path) -> None:
    root = write_examination(tmp_path / "exam", adc=False)
    write_series(Volume(ARRAYS[DWI] * 0.4, GRID), root / "6", uid="6", description="t2_flair_sag")
    assert study(root, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["case"]["files"]["adc"].startswith("computed from")
    assert "flair" not in report["case"]["files"]
    assert any("FLAIR: not used" in note for note in report["repairs"])


def test_two_adc_maps_of_which_none_can_be_told_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_examination(tmp_path / "exam")
    write_series(
        Volume(ARRAYS[ADC], GRID),
        root / "7",
        uid="7",
        description="ADC again",
        image_type=ADC_TYPE,
    )
    assert study(root, tmp_path / "out") == 3
    assert "several DICOM series could be the ADC" in write_final_error_line(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_two_studies_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_examination(tmp_path / "exam")

    def elsewhere(dataset: Dataset) -> None:
        dataset.StudyInstanceUID = "1.2.4"

    for file in (root / "3").iterdir():
        edited(file, elsewhere)
    assert study(root, tmp_path / "out") == 3
    assert "several studies" in write_final_error_line(capfd.readouterr().err)


@pytest.mark.parametrize("what", ["nifti", "nothing", "empty", "hostile names", "bomb", "truncated"])
def test_what_is_no_examination_is_refused_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    given = tmp_path / {"nifti": "a.nii.gz", "nothing": "nowhere", "empty": "empty"}.get(what, "a.zip")
    if what == "nifti":
        sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), str(given))
    elif what == "empty":
        given.mkdir()
    elif what == "hostile names":
        with zipfile.ZipFile(given, "w") as archive:
            link = zipfile.ZipInfo("link.dcm")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
            archive.writestr("../../../outside.dcm", b"x" * 200)
            archive.writestr("/tmp/outside23.dcm", b"x" * 200)
    elif what == "bomb":
        with zipfile.ZipFile(given, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.dcm", b"\0" * (200 << 20))
    elif what == "truncated":
        whole = zipped(write_examination(tmp_path / "exam"), given)
        whole.write_bytes(whole.read_bytes()[:-5000])
    assert study(given, tmp_path / "out") == 3
    said = capfd.readouterr()
    assert write_final_error_line(said.err)
    assert "bug" not in said.err
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/outside23.dcm").exists()


def test_mercure_gets_objects_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments; a task.json lies beside the instances, which lie side by side."""
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    for file in (path for path in write_examination(tmp_path / "exam").rglob("*") if path.is_file()):
        file.rename(given / file.name)
    monkeypatch.setenv("MERCURE_IN_DIR", str(given))
    monkeypatch.setenv("MERCURE_OUT_DIR", str(out))
    monkeypatch.setenv("ISLES_SKULL_STRIP", "never")
    before = tree(given)
    assert main([]) == 0
    assert set(tree(out)) == OBJECTS
    assert tree(given) == before
    assert {pydicom.dcmread(path).StudyInstanceUID for path in out.iterdir()} == {"1.2.3"}


def test_mercures_folder_without_a_dwi_is_refused_and_out_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    write_enhanced([(None, Volume(ARRAYS[DWI], GRID))], tmp_path / "in" / "a.dcm", description="t1_mprage")
    (tmp_path / "in" / "task.json").write_text("{}")
    monkeypatch.setenv("MERCURE_IN_DIR", str(tmp_path / "in"))
    monkeypatch.setenv("MERCURE_OUT_DIR", str(tmp_path / "out"))
    assert main([]) == 3
    assert "DWI" in write_final_error_line(capfd.readouterr().err)
    assert tree(tmp_path / "out") == {}


def test_one_of_mercures_variables_alone_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MERCURE_IN_DIR", str(tmp_path))
    assert main([]) == 2
    assert "MERCURE_OUT_DIR" in write_final_error_line(capfd.readouterr().err)
