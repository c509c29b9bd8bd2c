"""Batches: what is found, what is done once and only once, and a tree that no way of dying spoils."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import ensemble.publish
from batch_runs import BROKEN, comparable, run_batch, start_batch, write_case, write_dataset, write_weights
from conftest import (
    GRID,
    StubMember,
    phantom_arrays,
    phantom_case,
    phantom_lesion,
    tree,
    write_contract_case,
    write_image,
)
from dicom_files import write_series
from ensemble.batch import workers
from ensemble.batch.claims import Session
from ensemble.batch.find import find_cases
from ensemble.batch.identity import input_digests
from ensemble.batch.progress import show
from ensemble.batch.run import batch
from ensemble.batch.work import Job, Outcome
from ensemble.batch.workers import gpus
from ensemble.cli import main
from ensemble.config import Extras, RunConfig
from ensemble.errors import InputRefused, UsageError, WeightsBroken
from ensemble.metrics import dice
from ensemble.outputs.artifacts import Segmented
from ensemble.outputs.layouts.bids import write_case as write_results
from ensemble.outputs.layouts.places import Place, assign_places
from ensemble.pipeline import Ensemble, segment
from ensemble.progress import Silent
from ensemble.readers.sources import source_files, stamps
from ensemble.types import Modality
from ensemble.volume import Volume, grid_of

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(dataset: Path, out: Path = Path("/nowhere")) -> dict[str, list[str]]:
    """Names of the files of each case; of a case with a problem, the problem."""
    root = dataset if dataset.is_dir() else dataset.parent
    said = {}
    for case in find_cases(dataset, out):
        names = [path.relative_to(root.resolve()).as_posix() for path in case.files.values()]
        said[case.name] = [case.problem.what] if case.problem else names
    return said


# Finding


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
        "other": ["there is no DWI and no ADC image"],
        "twice": ["there is more than one DWI image"],
        "empty": ["there is no DWI and no ADC image"],
    }


SEVERAL = ["the names of several cases lie where the images of one are expected"]


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
            {"sub-1/ses-1": ["a file's name and its folder name different cases"]},
        ),
        (
            "sub-1/dwi/sub-1_dwi.nii sub-1/dwi/sub-1_adc.nii sub-1/anat/sub-2_FLAIR.nii",
            {"sub-1": ["a file's name and its folder name different cases"]},
        ),
        (
            "a/b_dwi.nii a/b_adc.nii a/c_dwi.nii a/c_adc.nii a/b/dwi.nii a/b/adc.nii",
            {"a/b": ["2 cases have one name"], "a/c": ["a/c_dwi.nii", "a/c_adc.nii"]},
        ),
        ("dwi.nii adc.nii data/dwi.nii data/adc.nii", {"data": ["2 cases have one name"]}),
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
        "sub-1/ses-2": "there is no DWI and no ADC image",
        "sub-2": "there is no DWI image",
        "sub-3": "there is no DWI and no ADC image",
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
        if Path(path).name == "secret":
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


# Places


def test_names_become_bids_labels_and_never_meet() -> None:
    names = ["sub-01/ses-a", "sub-02", "case_01", "case 02", "case-02", "Case02", "日本", "sub-01", "x/ses-1"]
    places = assign_places(names)
    assert places["sub-01/ses-a"] == Place("01", "a")
    assert places["sub-02"] == Place("02")
    assert places["case_01"] == Place("case01")
    assert places["sub-01"].subject.startswith("01x"), "would stand around the sessions of the other sub-01"
    folders = [place.folder.as_posix().lower() for place in places.values()]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert all(part.split("-", 1)[1].isalnum() and part.isascii() for part in folder.split("/"))


def test_names_of_any_length_have_places_of_their_own() -> None:
    names = ["a" * 260 + "1", "a" * 260 + "2", "sub-" + "b" * 90 + "/ses-" + "c" * 260, "sub-" + "b" * 90 + "/ses-c"]
    places = assign_places(names)
    assert len({place.folder for place in places.values()}) == len(names)
    assert max(len(place.prefix) for place in places.values()) < 130
    assert places[names[3]] == Place("b" * 90, "c"), "what fits stays as it is"


# Locks


def test_a_case_belongs_to_one_at_a_time_and_failures_are_shared(tmp_path: Path) -> None:
    first, second, other = (Session(tmp_path, recipe) for recipe in ("x", "x", "y"))
    lock = first.claim(Place("1"))
    assert lock is not None
    assert second.claim(Place("1")) is None
    first.note_failure(Place("1"), {"message": "x", "exit_code": 3})
    first.release(lock)
    assert second.failure(Place("1")) == {"message": "x", "exit_code": 3}
    assert other.failure(Place("1")) is None, "with other options it may succeed"
    other.leave()
    assert second.claim(Place("1")) is not None
    first.leave()
    assert (tmp_path / ".batch").exists(), "somebody is still there"
    second.leave()
    assert tree(tmp_path) == {}


def test_what_a_dead_process_left_is_gone_with_the_next_session(tmp_path: Path) -> None:
    touch(tmp_path, ".batch/unfinished-x/mask", ".batch/notes-x/sub-1.json", ".batch/session.lock")
    session = Session(tmp_path, "x")
    assert set(tree(tmp_path)) == {".batch", ".batch/session.lock"}
    session.leave()


# Inputs


def test_all_files_of_an_image_count(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(phantom_arrays()[DWI])
    for ending, data in ((".mhd", "x.raw"), (".nhdr", "x.raw.gz")):
        header = tmp_path / f"x{ending}"
        sitk.WriteImage(image, str(header), useCompression=ending == ".nhdr")
        assert [name for name, _ in source_files(header)] == [header.name, data]
        before, state = input_digests({DWI: header}), stamps([header])
        (tmp_path / data).write_bytes(b"other")
        assert input_digests({DWI: header}) != before
        assert stamps([header]) != state
    assert [name for name, _ in source_files(tmp_path)] == ["x.mhd", "x.nhdr", "x.raw", "x.raw.gz"]
    with pytest.raises(InputRefused, match="can't be read"):
        input_digests({DWI: tmp_path / "gone.nii.gz"})


def test_a_header_that_can_not_be_read_is_no_bug(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case, data in (("long", "x" * 300), ("secret", "x.raw")):
        for modality in ("dwi", "adc"):
            path = tmp_path / "data" / case / f"{modality}.mhd"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"NDims = 3\nElementDataFile = {data}\n")
    really = Path.open

    def open_(self: Path, *how: Any, **more: Any) -> Any:
        if self.parent.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *how, **more)

    monkeypatch.setattr(Path, "open", open_)
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 3
    messages = {case: row["message"] for case, row in rows(tmp_path / "out").items()}
    assert "the DWI image can't be read" in messages["secret"]
    assert "bug" not in messages["long"] + messages["secret"]


# Whole batches


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "summary.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_good_cases_are_done_and_bad_ones_explained(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ensemble")
    data, out = write_dataset(tmp_path / "data", good=2), tmp_path / "out"
    before = tree(data)
    assert run_batch(data, out, weights, report=True) == 5
    assert tree(data) == before
    table = rows(out)
    assert {case: row["status"] for case, row in table.items()} == {
        "case 000": "done", "case 001": "done", **dict.fromkeys(BROKEN, "failed")
    }  # fmt: skip
    for case, part in (
        ("cut off", "truncated"), ("no adc", "no ADC"), ("constant", "constant"), ("empty", "an empty folder"),
        ("the members fail", "CUDA out of memory"),
    ):  # fmt: skip
        assert part in table[case]["message"]
    row = table["case 001"]
    mask = sitk.ReadImage(str(out / row["mask"]))
    assert dice(phantom_lesion(), sitk.GetArrayFromImage(mask)) > 0.95
    assert GRID.distance_voxels(grid_of(mask)) < 1e-4
    assert float(row["volume_ml"]) == pytest.approx(phantom_lesion().sum() * GRID.voxel_ml, rel=0.1)
    assert (row["lesions"], row["voters"]) == ("1", "one two")
    assert 0.9 < float(row["agreement"]) <= 1
    assert {path.name for path in (out / "sub-case001").iterdir()} == {
        "sub-case001_space-dwi_label-lesion_mask.nii.gz", "sub-case001_space-dwi_label-lesion_mask.json",
        "report.json", "report.html", "overlay.png",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "README.md", "dataset_description.json", ".bidsignore", "summary.csv", "index.html", "sub-case000", "sub-case001"
    }  # fmt: skip
    assert "[7/7]" in caplog.text
    assert "2 cases done (0 of them before or by another process), 5 failed" in caplog.text


def test_what_is_complete_is_kept_and_what_changed_is_made_anew(tmp_path: Path, weights: Path) -> None:
    data, out, diary = tmp_path / "data", tmp_path / "out", tmp_path / "diary"
    for name in "abc":
        write_case(data / name)

    def asked(**options: object) -> list[str]:
        """The cases that went through the networks."""
        diary.write_text("")
        assert run_batch(data, out, weights, diary=diary, **options) == 0  # type: ignore[arg-type]
        return diary.read_text().split()

    assert asked() == ["a", "b", "c"]
    whole = tree(out)
    assert asked() == []
    assert {name: text for name, text in tree(out).items() if "index" not in name} == {
        name: text for name, text in whole.items() if "index" not in name
    }
    next((out / "sub-a").glob("*.nii.gz")).unlink()
    assert asked() == ["a"]
    write_image(phantom_arrays()[DWI] * 1.1, data / "b" / "dwi.nii.gz")
    assert asked() == ["b"]
    assert asked(resume=False) == ["a", "b", "c"]
    assert asked(config={"tta": "none"}) == ["a", "b", "c"]
    manifest = weights / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0" * 64, "1" * 64))
    assert asked(config={"tta": "none"}) == ["a", "b", "c"]
    assert asked(config={"tta": "none"}, report=True) == ["a", "b", "c"]


def test_a_result_that_no_longer_holds_does_not_pass_for_one(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    write_case(data / "b")
    assert run_batch(data, out, weights) == 0
    kept = tree(out / "sub-a")
    write_image(phantom_arrays()[DWI] * np.nan, data / "a" / "dwi.nii.gz")
    assert run_batch(data, out, weights) == 3
    assert not (out / "sub-a").exists()
    assert tree(out / "superseded" / "sub-a") == kept
    assert "was moved to" in rows(out)["a"]["message"]
    write_case(data / "a")
    assert run_batch(data, out, weights) == 0
    assert (out / "sub-a" / "report.json").is_file()


@pytest.mark.parametrize("given", ["", "list.csv"], ids=["folder", "worklist"])
@pytest.mark.parametrize("gone", ["adc.nii.gz", "dwi.nii.gz"])
def test_a_result_of_images_that_are_not_all_there_does_not_pass_for_one(
    tmp_path: Path, weights: Path, gone: str, given: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    (data / "list.csv").write_text("case,dwi,adc\na,a/dwi.nii.gz,a/adc.nii.gz\n")
    assert run_batch(data / given, out, weights) == 0
    (data / "a" / gone).unlink()
    assert run_batch(data / given, out, weights) == 3
    assert not (out / "sub-a").exists()
    assert (out / "superseded" / "sub-a" / "report.json").is_file()


def test_names_that_are_no_text_do_no_harm(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("x", "p"):
        write_case(data / name)
    (data / "x").rename(data / os.fsdecode(b"Sch\xe4del"))
    touch(data, os.fsdecode(b"br\xfcchig/dwi.nii.gz"))
    assert run_batch(data, out, weights, report=True) == 3
    statuses = {case: row["status"] for case, row in rows(out).items()}
    assert statuses == {"Sch\ufffddel": "done", "p": "done", "br\ufffdchig": "failed"}
    assert "Sch\ufffddel" in (out / "index.html").read_text(encoding="utf-8")
    for path in out.rglob("*.json"):
        assert "\\udc" not in path.read_text(encoding="utf-8"), f"{path.name} holds half a character"
    assert run_batch(data, out, weights, report=True) == 3
    assert rows(out)["Sch\ufffddel"]["status"] == "done"


def test_a_second_dwi_makes_an_earlier_result_one_of_something_else(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    assert run_batch(data, out, weights) == 0
    touch(data, "a/dwi.mha")
    assert run_batch(data, out, weights) == 3
    assert (out / "superseded" / "sub-a" / "report.json").is_file()


def test_a_slip_on_the_command_line_costs_no_result(tmp_path: Path, weights: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    assert run_batch(data, out, weights) == 0
    before = tree(out)
    with pytest.raises(UsageError, match="no GPU"):
        run_batch(data, out, weights, config={"device": "cuda", "tta": "none"})
    assert tree(out) == before


def test_a_missing_brain_extraction_ends_the_batch_and_costs_no_result(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.prepare import skull

    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    write_case(data / "b")
    assert run_batch(data, out, weights) == 0
    before = [tree(out / place) for place in ("sub-a", "sub-b")]
    monkeypatch.setattr(skull, "PACKAGE", "no_such_package")
    with pytest.raises(WeightsBroken, match="HD-BET"):
        run_batch(data, out, weights, config={"skull_strip": "always"})
    assert [tree(out / place) for place in ("sub-a", "sub-b")] == before


def test_a_vanished_input_costs_no_result(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in "ab":
        write_case(data / name)
    (data / "list.csv").write_text("case,dwi,adc\na,a/dwi.nii.gz,a/adc.nii.gz\nb,b/dwi.nii.gz,b/adc.nii.gz\n")
    assert run_batch(data / "list.csv", out, weights) == 0
    kept = tree(out / "sub-a")
    shutil.rmtree(data / "a")
    assert run_batch(data / "list.csv", out, weights) == 3
    assert tree(out / "sub-a") == kept
    assert "an earlier result stays" in rows(out)["a"]["message"]
    (data / "list.csv").unlink()
    assert run_batch(data, out, weights) == 0
    assert tree(out / "sub-a") == kept
    assert rows(out)["a"]["status"] == "not in the dataset"


def test_what_is_not_ours_is_not_replaced(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    touch(out, "sub-a/ses-1/mine.txt")
    assert run_batch(data, out, weights) == 3
    assert "something else stands" in rows(out)["a"]["message"]
    assert (out / "sub-a" / "ses-1" / "mine.txt").exists()


@pytest.mark.parametrize("described", ['{"DatasetType": "raw"}', "no json", '{"GeneratedBy": [{"Name": "fmriprep"}]}'])
def test_another_dataset_is_no_output_folder(tmp_path: Path, weights: Path, described: str) -> None:
    write_case(tmp_path / "data" / "a")
    write_case(tmp_path / "out" / "b")
    (tmp_path / "out" / "dataset_description.json").write_text(described)
    before = tree(tmp_path)
    for out in (tmp_path / "data", tmp_path / "out"):
        with pytest.raises(UsageError, match="a dataset of its own"):
            run_batch(tmp_path / "data", out, weights)
    assert tree(tmp_path) == before


def test_an_output_folder_that_is_none_or_unreadable_is_called_so(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "data" / "a")
    (tmp_path / "out").touch()
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UsageError, match="is a file, or lies below one"):
            run_batch(tmp_path / "data", out, weights)
    really = Path.read_text

    def read_text(self: Path, *how: Any, **more: Any) -> str:
        if self.parent.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *how, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UsageError, match="Permission denied"):
        run_batch(tmp_path / "data", tmp_path / "secret", weights)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.batch import work

    data, really = tmp_path / "data", work.read_case
    write_case(data / "a")

    def read(name: str, files: dict[Modality, Path]) -> object:
        raw = really(name, files)
        write_image(phantom_arrays()[DWI] * 2, files[DWI])
        return raw

    monkeypatch.setattr(work, "read_case", read)
    assert run_batch(data, tmp_path / "out", weights) == 3
    assert "changed while it was read" in rows(tmp_path / "out")["a"]["message"]


def test_a_bug_in_one_case_does_not_stop_the_others(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.batch import work

    data, really = tmp_path / "data", work.prepare
    for name in "abc":
        write_case(data / name)
    calls = iter(range(9))
    monkeypatch.setattr(work, "prepare", lambda *given: really(*given) if next(calls) != 1 else 1 / 0)
    assert run_batch(data, tmp_path / "out", weights) == 1
    assert {case: row["status"] for case, row in rows(tmp_path / "out").items()} == {
        "a": "done",
        "b": "failed",
        "c": "done",
    }
    assert "ZeroDivisionError" in rows(tmp_path / "out")["b"]["message"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_full_disk_ends_the_batch_and_a_rerun_finishes_it(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    data, out, whole = tmp_path / "data", tmp_path / "out", tmp_path / "whole"
    for name in "abcd":
        write_case(data / name)
    assert run_batch(data, whole, weights) == 0
    with monkeypatch.context() as patch:
        full: Callable[..., None]
        calls = iter(range(999))
        if failing == "fsync":
            really = ensemble.publish._to_disk

            def full(path: Path) -> None:
                if ".batch" in path.parts and next(calls) >= 9:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                really(path)

            patch.setattr(ensemble.publish, "_to_disk", full)
        else:
            rename = Path.rename

            def full(self: Path, target: Path) -> Path:  # type: ignore[misc]
                if next(calls) >= 2:
                    raise OSError(errno.ENOSPC, "No space left on device", str(self))
                return rename(self, target)

            patch.setattr(Path, "rename", full)
        with pytest.raises(UsageError, match="No space left"):
            run_batch(data, out, weights)
    done = {path.name for path in out.glob("sub-*")}
    assert 1 <= len(done) < 4
    assert {path.parent.name for path in out.glob("sub-*/report.json")} == done
    assert not (out / ".batch").exists()
    assert run_batch(data, out, weights) == 0
    assert comparable(out) == comparable(whole)


def test_a_bar_shows_how_far_it_is_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = show(3)
        for case, status in (("a", "done"), ("b", "failed"), ("c", "kept")):
            shown.tell(Outcome(case, status))  # type: ignore[arg-type]
        shown.close()
    said = b""
    with suppress(OSError):  # the end of a terminal that was closed
        while part := os.read(master, 4096):  # which gives what it holds in pieces
            said += part
    os.close(master)
    assert b"3/3" in said
    assert b"failed: 1" in said
    assert b"left" in said


def test_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus("cpu") == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpus("auto") == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5c1b")
    assert gpus("cuda") == ("2", "GPU-5c1b")


def test_an_error_of_the_system_in_a_process_for_a_gpu_is_told_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[UsageError] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "out").touch()
    job = Job(tmp_path / "out", RunConfig(), Extras(), {})
    workers._serve("", job, [], SimpleNamespace(send=said.append))  # type: ignore[arg-type]
    assert [error.exit_code for error in said] == [2]
    assert "Not a directory" in str(said[0]) or "File exists" in str(said[0])


def test_broken_weights_end_the_batch_before_it_begins(tmp_path: Path) -> None:
    write_case(tmp_path / "data" / "a")
    with pytest.raises(WeightsBroken):
        batch(tmp_path / "data", tmp_path / "out", RunConfig(weights=tmp_path / "none"), Extras())
    assert not (tmp_path / "out").exists()


def test_the_tree_passes_the_bids_validator(tmp_path: Path, weights: Path) -> None:
    for name in ("sub-1_ses-a", "case 2"):
        write_case(tmp_path / "data" / name)
    write_case(tmp_path / "data" / "sub-3" / "ses-b")
    extras = Extras(report=True, save_probabilities=True, save_member_masks=True)
    assert run_batch(tmp_path / "data", tmp_path / "out", weights, extras=extras) == 0

    def errors() -> set[str]:
        """Codes of what the validator calls an error."""
        command = [Path(sys.executable).with_name("bids-validator-deno"), "--format", "json", tmp_path / "out"]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DENO_NO_UPDATE_CHECK": "1",
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        issues = json.loads(done.stdout)["issues"]["issues"]
        return {issue["code"] for issue in issues if issue["severity"] == "error"}

    assert errors() == set()
    (tmp_path / "out" / "sub-case2" / "mask.nii.gz").write_bytes(b"x")
    assert errors(), "the validator must be able to fail"


def test_killed_at_random_moments_and_run_again_the_tree_is_that_of_an_undisturbed_run(
    tmp_path: Path, weights: Path
) -> None:
    data, out, whole = write_dataset(tmp_path / "data", good=8), tmp_path / "out", tmp_path / "whole"
    assert run_batch(data, whole, weights, report=True) == 5
    rng, killed = random.Random(3), 0
    for _ in range(5):
        process = start_batch(data, out, weights, report=True, seconds=0.03)
        deadline = time.monotonic() + 60
        while not (out / ".batch").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.join(rng.uniform(0.0, 1.5))
        killed += process.is_alive()
        process.kill()
        process.join()
        for report in out.glob("sub-*/report.json"):
            outputs = json.loads(report.read_text())["batch"]["outputs"]
            assert {name: (report.parent / name).stat().st_size for name in outputs} == outputs, "a half-written case"
    assert killed >= 2, "the kills came too late to mean anything"
    last = start_batch(data, out, weights, report=True)
    last.join()
    assert last.exitcode == 5
    assert comparable(out) == comparable(whole)


def test_members_whose_names_have_the_same_letters_do_not_share_a_file(
    tmp_path: Path, stub_ensemble: Callable[..., Ensemble]
) -> None:
    names = ("site_a", "site-a", "siteA", "b", "_", "..-")
    ensemble = stub_ensemble(*(StubMember(name, level=1.2 + number / 5) for number, name in enumerate(names)))
    result, extras = segment(phantom_case(), ensemble, Silent()), Extras(save_member_masks=True)
    place = Place("1")
    for members in (range(6), range(2)):
        some = replace(result, outcomes=tuple(result.outcomes[number] for number in members))
        write_results(
            tmp_path / "out", tmp_path / "s", place, Segmented(phantom_case(), some, ensemble), extras, {"key": "x"}
        )
        folder = tmp_path / "out" / place.folder
        masks = [path.name.lower() for path in folder.glob("*_desc-*_mask.nii.gz")]
        assert len(set(masks)) == len(members)
        said = {json.loads(path.read_text())["Description"].split()[-2] for path in folder.glob("*_desc-*_mask.json")}
        assert said == {names[number] for number in members}
    assert (tmp_path / "out" / "sub-1" / "sub-1_space-dwi_label-lesion_mask.nii.gz").is_file()


def test_the_comparison_of_trees_notices_a_difference(tmp_path: Path, weights: Path) -> None:
    write_case(tmp_path / "data" / "a")
    for name, options in (("x", {}), ("y", {"config": {"fusion": "mean"}})):
        run_batch(tmp_path / "data", tmp_path / name, weights, report=True, **options)  # type: ignore[arg-type]
    one, other = comparable(tmp_path / "x"), comparable(tmp_path / "y")
    assert {name for name in one if one[name] != other[name]} >= {"sub-a/report.json", "sub-a/report.html"}


def test_two_processes_share_the_work_and_no_case_is_done_twice(tmp_path: Path, weights: Path) -> None:
    data, out, whole, diary = (
        write_dataset(tmp_path / "data", good=9),
        tmp_path / "out",
        tmp_path / "whole",
        tmp_path / "d",
    )
    assert run_batch(data, whole, weights) == 5
    both = [start_batch(data, out, weights, seconds=0.05, diary=diary) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [5, 5]
    asked = Counter(diary.read_text().splitlines())
    assert set(asked.values()) == {1}, "a case was done twice"
    assert len(asked) == 10
    assert comparable(out) == comparable(whole)


def test_a_process_takes_over_from_one_that_is_killed(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(6):
        write_case(data / f"p{number}")
    doomed = start_batch(data, out, weights, seconds=30.0)
    deadline = time.monotonic() + 60
    while not list(out.glob(".batch/locks/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    helper = start_batch(data, out, weights)
    helper.join(3)
    assert helper.is_alive(), "it waits for the cases that the other one has"
    doomed.kill()
    helper.join(60)
    assert helper.exitcode == 0
    assert [row["status"] for row in rows(out).values()] == ["done"] * 6


def test_an_interrupted_batch_says_what_is_not_done(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.batch import work

    data, really, calls = tmp_path / "data", work.predict, iter(range(9))
    for name in "abcd":
        write_case(data / name)

    def predict(*arguments: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        run_batch(data, tmp_path / "out", weights)
    statuses = {case: row["status"] for case, row in rows(tmp_path / "out").items()}
    assert statuses["a"] == "done"
    assert statuses["c"] == statuses["d"] == "not done"
    assert not (tmp_path / "out" / ".batch").exists()
    monkeypatch.undo()
    assert run_batch(data, tmp_path / "out", weights) == 0
    monkeypatch.setattr(work, "predict", predict)
    calls = iter((2,))
    with pytest.raises(KeyboardInterrupt):
        run_batch(data, tmp_path / "out", weights, resume=False)
    last = rows(tmp_path / "out")["d"]
    assert (last["status"], last["lesions"]) == ("earlier result", "1")
    assert (tmp_path / "out" / last["mask"]).is_file()


def test_the_command(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From outside, with networks that are really loaded, and a process for each of two devices."""
    from nnunet_folders import FolderSpec, build_folder

    real = tmp_path / "real"
    build_folder(real / "first", FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0)))
    for name in ("p1", "p2"):
        write_contract_case(tmp_path / "data" / name)
    common = ["--weights", str(real), "--device", "cpu", "--tta", "none"]
    extra = ["--save-probabilities", "--save-member-masks"]
    assert main(["batch", str(tmp_path / "data"), str(tmp_path / "one"), *common, *extra]) == 0
    assert len(list((tmp_path / "one" / "sub-p1").glob("*.nii.gz"))) == 5
    digests = json.loads((tmp_path / "one" / "sub-p1" / "report.json").read_text())["members"][0]["weights_sha256"]
    assert len(digests) == 3
    config = RunConfig(weights=real, device="cpu", tta="none")
    extras = Extras(save_probabilities=True, save_member_masks=True)
    assert batch(tmp_path / "data", tmp_path / "two", config, extras, workers=("", "")) == 0
    assert comparable(tmp_path / "two") == comparable(tmp_path / "one")
    assert main(["batch", str(tmp_path / "data"), str(tmp_path / "one"), *common, "--no-resume"]) == 0
    assert main(["batch", str(tmp_path / "gone"), str(tmp_path / "three"), *common]) == 3
    assert not (tmp_path / "three").exists()
    assert "the dataset does not exist" in capsys.readouterr().out
