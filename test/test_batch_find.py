"""Which cases a dataset holds: nothing that looks like one is passed over, and no two are joined."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from batch_runs import touch
from conftest import GRID, phantom_arrays
from dicom_files import write_series
from ensemble.batch.case_list import read_case_list, write_case_list
from ensemble.batch.find import find_cases
from ensemble.batch.layouts import FoundCase
from ensemble.errors import InputRefused
from ensemble.types import Modality
from ensemble.volume import Volume

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR


def found(dataset: Path, out: Path = Path("/nowhere")) -> dict[str, list[str]]:
    """Names of the files of each case; of a case with a problem, the problem. Of folders a list of the cases must say the same."""
    root = dataset if dataset.is_dir() else dataset.parent
    said = {}
    cases = find_cases(dataset, out)
    if dataset.is_dir():
        refuse_other_list(cases, dataset)
    for case in cases:
        names = [path.relative_to(root.resolve()).as_posix() for path in case.files.values()]
        said[case.name] = [case.problem.what] if case.problem else names
    return said


def refuse_other_list(cases: tuple[FoundCase, ...], dataset: Path) -> None:
    """Raise AssertionError unless these cases are the same again once they were written to a list."""
    with tempfile.TemporaryDirectory() as folder:
        listed = write_case_list(cases, dataset, Path(folder))
        again = read_case_list(listed.path, dataset)
    for case, same in zip(cases, again, strict=True):
        assert (str(case.problem), list(case.files)) == (str(same.problem), list(same.files))
        assert same.listed == listed.searched
        assert replace(same, listed="", problem=case.problem) == case


@pytest.mark.parametrize("inner", ["", "rawdata/"])
def test_the_isles22_release_is_found(tmp_path: Path, inner: str) -> None:
    for subject in ("sub-strokecase0001", "sub-strokecase0002"):
        base = f"{inner}{subject}/ses-0001/"
        name = f"{subject}_ses-0001_"
        touch(tmp_path, f"{base}dwi/{name}dwi.nii.gz", f"{base}dwi/{name}adc.nii.gz", f"{base}anat/{name}FLAIR.nii.gz")
        touch(tmp_path, f"{base}dwi/{name}dwi.json", f"derivatives/{subject}/ses-0001/{name}msk.nii.gz")
    said = found(tmp_path)
    assert set(said) == {"sub-strokecase0001/ses-0001", "sub-strokecase0002/ses-0001"}
    assert said["sub-strokecase0001/ses-0001"] == [
        f"{inner}sub-strokecase0001/ses-0001/{place}"
        for place in (
            "dwi/sub-strokecase0001_ses-0001_dwi.nii.gz",
            "dwi/sub-strokecase0001_ses-0001_adc.nii.gz",
            "anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz",
        )
    ]


def test_contract_folders_are_found(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(tmp_path, *(f"{case}/images/{slug}-brain-mri/{case}{slug}-0f3.mha" for slug in ("dwi", "adc", "flair")))
    assert set(found(tmp_path)) == {"a", "b"}
    assert len(found(tmp_path)["a"]) == 3
    assert list(found(tmp_path / "a")) == ["a"]


def test_flat_folders_are_found_whatever_the_files_are_called(tmp_path: Path) -> None:
    touch(tmp_path, "p1/dwi.nii.gz", "p1/adc.mha", "p1/FLAIR.nrrd", "p1/lesion_gt.nii.gz", "p1/notes.txt")
    touch(tmp_path, "site/p2/ep2d_DWI.nii", "site/p2/ep2d_ADC.nii")
    touch(tmp_path, "many/x_dwi.nii.gz", "many/x_adc.nii.gz", "many/y-dwi.nii.gz", "many/y-adc.nii.gz")
    assert found(tmp_path) == {
        "p1": ["p1/dwi.nii.gz", "p1/adc.mha", "p1/FLAIR.nrrd"],
        "site/p2": ["site/p2/ep2d_DWI.nii", "site/p2/ep2d_ADC.nii"],
        "many/x": ["many/x_dwi.nii.gz", "many/x_adc.nii.gz"],
        "many/y": ["many/y-dwi.nii.gz", "many/y-adc.nii.gz"],
    }


def test_nothing_that_looks_like_a_case_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "good/dwi.nii.gz", "good/adc.nii.gz", "no adc/dwi.nii.gz", "other/t1.nii.gz")
    touch(tmp_path, "twice/dwi.nii.gz", "twice/dwi.mha", "twice/adc.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    said = found(tmp_path)
    assert said.pop("good") == ["good/dwi.nii.gz", "good/adc.nii.gz"]
    assert said == {
        "no adc": ["there is no ADC image"],
        "other": ["the folder has no DWI and no ADC image"],
        "twice": ["there is more than one DWI image"],
        "empty": ["the folder has no DWI and no ADC image"],
    }


SEVERAL = ["a folder that should hold the images of one case has images of several"]


@pytest.mark.parametrize(
    ("files", "cases"),
    [
        ("pool/17_dwi.nii pool/17_adc.nii pool/18_flair.nii", {"pool": SEVERAL}),
        ("17_dwi.nii 18_adc.nii", {"data": SEVERAL}),
        ("pool/17_dwi.nii pool/17_adc.nii pool/18_flair.zip", {"pool": SEVERAL}),
        ("sub-a_1_dwi.nii sub-a_2_adc.nii", {"sub-a": SEVERAL}),
        ("p/dwi.nii p/study_adc.nii", {"p": ["p/dwi.nii", "p/study_adc.nii"]}),
        ("1_dwi.nii 1_adc.nii 2_dwi.nii 2_adc.nii", {"1": ["1_dwi.nii", "1_adc.nii"], "2": ["2_dwi.nii", "2_adc.nii"]}),
        (
            "A/sub-1/sub-1_dwi.nii A/sub-1/sub-1_adc.nii B/sub-1/sub-1_FLAIR.nii",
            {"A/sub-1": ["A/sub-1/sub-1_dwi.nii", "A/sub-1/sub-1_adc.nii"], "B/sub-1": ["there is no DWI image"]},
        ),
        (
            "A/sub-1/sub-1_ses-1_dwi.nii A/sub-1/sub-1_ses-1_adc.nii B/sub-1/sub-1_ses-2_FLAIR.nii",
            {
                "A/sub-1/ses-1": ["A/sub-1/sub-1_ses-1_dwi.nii", "A/sub-1/sub-1_ses-1_adc.nii"],
                "B/sub-1/ses-2": ["there is no DWI image"],
            },
        ),
        (
            "A/sub-1_dwi.nii A/sub-1_adc.nii B/sub-1_FLAIR.nii",
            {"A/sub-1": ["A/sub-1_dwi.nii", "A/sub-1_adc.nii"], "B/sub-1": ["there is no DWI image"]},
        ),
        (
            "A/dwi/sub-1_run-1_dwi.nii A/adc/sub-1_run-2_adc.nii",
            {"sub-1": ["A/dwi/sub-1_run-1_dwi.nii", "A/adc/sub-1_run-2_adc.nii"]},
        ),
        (
            "sub-1/ses-1/dwi/sub-1_dwi.nii sub-1/ses-1/dwi/sub-1_adc.nii sub-1/ses-2/anat/sub-1_FLAIR.nii",
            {
                "sub-1/ses-1": ["sub-1/ses-1/dwi/sub-1_dwi.nii", "sub-1/ses-1/dwi/sub-1_adc.nii"],
                "sub-1/ses-2": ["there is no DWI image"],
            },
        ),
        (
            "sub-1/ses-1/sub-1_ses-1_dwi.nii sub-1/ses-1/sub-1_ses-2_adc.nii",
            {"sub-1/ses-1": ["the name of a file and the name of its folder belong to different cases"]},
        ),
        (
            "sub-1/dwi/sub-1_dwi.nii sub-1/dwi/sub-1_adc.nii sub-1/anat/sub-2_FLAIR.nii",
            {"sub-1": ["the name of a file and the name of its folder belong to different cases"]},
        ),
        (
            "a/b_dwi.nii a/b_adc.nii a/c_dwi.nii a/c_adc.nii a/b/dwi.nii a/b/adc.nii",
            {"a/b": ["2 cases have the same name"], "a/c": ["a/c_dwi.nii", "a/c_adc.nii"]},
        ),
        ("dwi.nii adc.nii data/dwi.nii data/adc.nii", {"data": ["2 cases have the same name"]}),
    ],
)
def test_images_of_different_cases_are_never_joined(tmp_path: Path, files: str, cases: dict[str, list[str]]) -> None:
    touch(tmp_path / "data", *files.split())
    assert found(tmp_path / "data") == cases


@pytest.mark.parametrize("flair", ["p/flair.zip", "p/flair/1.dcm", "p/x_flair.zip"])
def test_dicom_beside_image_files_is_not_passed_over(tmp_path: Path, flair: str) -> None:
    touch(tmp_path, "p/dwi.nii", "p/adc.nii", "p/dwi/1.dcm", "p/x_adc.zip", flair)
    taken = flair.removesuffix("/1.dcm")
    assert found(tmp_path) == {"p": ["p/dwi.nii", "p/adc.nii", taken]}
    touch(tmp_path, "p/ep2d_flair.zip")
    assert any(case.problem for case in find_cases(tmp_path, Path("/nowhere"))), "one of two, and nothing is said"


@pytest.mark.parametrize("flair", ["", "/x.zip"])
def test_dicom_in_a_contract_folder_is_not_passed_over(tmp_path: Path, flair: str) -> None:
    images, dicom = "p/images", "p/images/flair-brain-mri"
    touch(tmp_path, f"{images}/dwi-brain-mri/a.mha", f"{images}/adc-brain-mri/b.mha", f"{dicom}{flair or '/s.1/1.dcm'}")
    assert found(tmp_path)["p"][2:] == [dicom + flair]


def test_dicom_beside_image_files_at_the_root_belongs_to_them(tmp_path: Path) -> None:
    touch(tmp_path / "p", "dwi.nii", "adc.nii", "flair/1.dcm", "other/dwi.nii")
    assert found(tmp_path / "p") == {"p": ["dwi.nii", "adc.nii", "flair"], "other": ["there is no ADC image"]}


def test_dicom_cases_are_found_by_names_or_by_their_series(tmp_path: Path) -> None:
    images = {m: Volume(phantom_arrays()[m], GRID) for m in (DWI, ADC)}
    described = {DWI: {"description": "ep2d_diff trace", "b": 1000.0}, ADC: {"description": "ep2d_diff_ADC"}}
    for number, (modality, words) in enumerate(described.items()):
        slug = f"{modality.value}-brain-mri"
        places = (tmp_path / "together", tmp_path / "named" / modality.value, tmp_path / "contract" / "images" / slug)
        for place in places:
            write_series(images[modality], place, uid=str(number), **words)
    shutil.make_archive(str(tmp_path / "zipped" / "dwi"), "zip", tmp_path / "named" / "dwi")
    shutil.make_archive(str(tmp_path / "zipped" / "adc"), "zip", tmp_path / "named" / "adc")
    write_series(images[ADC], tmp_path / "alone", description="ep2d_diff_ADC")
    assert found(tmp_path) == {
        "alone": ["there is no DWI image"],
        "contract": ["contract/images/dwi-brain-mri", "contract/images/adc-brain-mri"],
        "named": ["named/dwi", "named/adc"],
        "together": ["together", "together"],
        "zipped": ["zipped/dwi.zip", "zipped/adc.zip"],
    }


def test_of_a_bids_tree_sessions_without_images_are_named_and_other_folders_left_alone(tmp_path: Path) -> None:
    touch(tmp_path, "sub-1/ses-1/dwi/sub-1_ses-1_dwi.nii.gz", "sub-1/ses-1/dwi/sub-1_ses-1_adc.nii.gz", "logs/x.txt")
    touch(tmp_path, "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz", "sub-2/anat/sub-2_FLAIR.nii.gz")
    (tmp_path / "sub-3").mkdir()
    problems = {case.name: case.problem and case.problem.what for case in find_cases(tmp_path, Path("/nowhere"))}
    assert problems == {
        "sub-1/ses-1": None,
        "sub-1/ses-2": "the folder has no DWI and no ADC image",
        "sub-2": "there is no DWI image",
        "sub-3": "the folder has no DWI and no ADC image",
    }


def test_results_of_another_time_are_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "p1/dwi.nii.gz", "p1/adc.nii.gz", "results/sub-1/sub-1_space-dwi_label-lesion_mask.nii.gz")
    (tmp_path / "results" / "dataset_description.json").write_text('{"DatasetType": "derivative"}')
    assert list(found(tmp_path)) == ["p1"]


def test_a_folder_that_can_not_be_read_is_a_case_with_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "p1/dwi.nii.gz", "p1/adc.nii.gz", "secret/dwi.nii.gz")
    really = os.scandir

    def scan(path: str) -> object:
        if str(path).endswith("/secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert found(tmp_path) == {"p1": ["p1/dwi.nii.gz", "p1/adc.nii.gz"], "secret": ["the folder can't be read"]}


def test_links_are_followed_once_and_the_output_folder_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path / "store", "p1/dwi.nii.gz", "p1/adc.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "p1").symlink_to(tmp_path / "store" / "p1")
    (data / "p1" / "loop").symlink_to(data)
    touch(data / "out", "sub-x/dwi.nii.gz", "sub-x/adc.nii.gz")
    assert [case.name for case in find_cases(data, data / "out")] == ["p1"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_worklist(tmp_path: Path, delimiter: str) -> None:
    touch(tmp_path, "a/1.nii.gz", "a/2.nii.gz", "b/1.nii.gz", "b/2.nii.gz")
    rows = (
        ["Case", "DWI", "adc", "flair", "remark"],
        ["B 1", "b/1.nii.gz", "b/2.nii.gz", "", "x"],
        ["A", "a/1.nii.gz", "a/2.nii.gz", "a/3.nii.gz", ""],
        ["C", "a/1.nii.gz", "", "", ""],
    )
    (tmp_path / "list.csv").write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows))
    assert found(tmp_path / "list.csv") == {
        "A": ["a/1.nii.gz", "a/2.nii.gz", "a/3.nii.gz"],
        "B 1": ["b/1.nii.gz", "b/2.nii.gz"],
        "C": ["there is no ADC image"],
    }


@pytest.mark.parametrize("text", ["", "case,dwi\nx,y\n", "case,dwi,adc\nx,1,2\nx,3,4\n", "\xff\xfe\x00binary"])
def test_a_worklist_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputRefused):
        find_cases(tmp_path / "list.csv", Path("/nowhere"))


def test_a_dataset_without_cases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputRefused):
            find_cases(place, Path("/nowhere"))
