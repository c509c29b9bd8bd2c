"""The list of cases that `slurm` writes: jobs that read it make what a search of the dataset makes. test_batch_find.py has all layouts."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from batch_runs import _load, comparable, rows, run_batch, touch, write_bids, write_case, write_dataset
from ensemble.batch import estimate, run
from ensemble.batch.case_list import read_case_list, write_case_list
from ensemble.batch.find import find_cases
from ensemble.batch.run import BatchCases
from ensemble.cli import main
from ensemble.errors import InputRefused

NOWHERE = Path("/nowhere")


def listed(data: Path, folder: Path) -> Path:
    """The list of what a search of `data` finds now."""
    folder.mkdir(exist_ok=True)
    return write_case_list(find_cases(data, NOWHERE), data, folder).path


def write_runs(root: Path) -> Path:
    """BIDS with sessions, several runs (a note on the choice), names that are not UTF-8, and two problems."""
    write_bids(root, {"01": ("a", "b"), "02": ("",), "03": ("",)})
    write_case(root / "sub-02" / "dwi", prefix="sub-02_run-2_")
    for name in ("dwi", "adc"):
        (root / f"sub-02/dwi/sub-02_{name}.nii.gz").rename(root / f"sub-02/dwi/sub-02_run-1_{name}.nii.gz")
    (root / "sub-03/dwi/sub-03_adc.nii.gz").unlink()
    touch(root, "sub-04/anat/sub-04_T1w.nii.gz", os.fsdecode(b"sub-05/\xff/sub-05_dwi.nii.gz"))
    return root


def write_folders(root: Path) -> Path:
    """Folders with five kinds of broken cases, and nnU-Net's channels beside them."""
    write_dataset(root, 1)
    for modality, channel in (("dwi", "0000"), ("adc", "0001")):
        (root / "imagesTs").mkdir(exist_ok=True)
        (root / "case 000" / f"{modality}.nii.gz").rename(root / "imagesTs" / f"x_{channel}.nii.gz")
    (root / "case 000").rmdir()
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "DWI", "1": "ADC"}}))
    return root


@pytest.mark.parametrize("write", [write_runs, write_folders])
def test_the_jobs_that_slurm_writes_make_what_one_batch_makes_and_search_nothing(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out, whole, scripts = (tmp_path / name for name in ("da ta", "out", "whole", "jobs"))
    write(data)
    monkeypatch.setattr(run, "load_from_config", partial(_load, diary=None, seconds=0.0))
    monkeypatch.setattr(estimate.CostModel, "cpu_seconds", lambda *_: 1.0)
    monkeypatch.setattr(estimate, "family_of", lambda spec: type("F", (), {"networks": staticmethod(lambda _: [])}))
    options = ["--weights", str(weights), "--device", "cpu"]
    code = main(["batch", str(data), str(whole), *options])
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "da ta", "out", "--scripts", "jobs", "--shards", "2", *options]) == 0
    monkeypatch.setattr(run, "find_cases", None)  # whoever searches, fails
    array, group = ((scripts / f"{name}.sbatch").read_text().splitlines()[-1] for name in ("participant", "group"))
    words = shlex.split(array)
    codes = [main([*words[words.index("batch") : -1], f"{number}/2"]) for number in (1, 2)]
    assert code in codes
    words = shlex.split(group)
    assert main(words[words.index(str(data)) :]) == code
    assert comparable(out) == comparable(whole)
    assert "call process.py slurm again" in (scripts / "submit.sh").read_text()
    assert "If any joined or were mended since" in capsys.readouterr().out


def test_an_image_that_has_gone_since_fails_its_case_and_says_what_to_do(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("a", "b", "c", "d"):
        write_case(data / name)
    cases = BatchCases(data, case_list=listed(data, tmp_path / "jobs"))
    assert run_batch(cases, out, weights) == 0
    (data / "a" / "adc.nii.gz").unlink()
    for path in (data / "b").iterdir():
        path.unlink()
    (data / "b").rmdir()
    (data / "c" / "dwi.nii.gz").unlink()
    (data / "c" / "dwi.nii.gz").symlink_to("nowhere.nii.gz")
    write_case(data / "joined")
    assert run_batch(cases, out, weights) == 3
    table = rows(out)
    assert set(table) == {"a", "b", "c", "d"}, "the list is what was found then"
    assert table["d"]["status"] == "done"
    for name, image in (("a", "ADC"), ("b", "DWI")):
        assert table[name]["status"] == "failed"
        for said in (f"the {image} image has gone since the dataset was searched", "slurm DATASET OUT", "restore it"):
            assert said in table[name]["message"]
    assert "git annex get" in table["c"]["message"], "a link whose content is missing is no file that has gone"
    assert "superseded" in table["a"]["message"], "its mask was made from an image that is no longer there"
    # cases that have gone altogether keep their results, as with a search
    assert (out / "sub-b" / "report.json").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-20], "damaged, or was changed"),
        (lambda text: text.replace('"name": "a"', '"name": "z"'), "damaged, or was changed"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "another version of the program"),
        (lambda text: "case,dwi,adc\na,a/dwi.nii.gz,a/adc.nii.gz\n", "no list of cases"),
        (lambda text: "", "no list of cases"),
        (lambda text: "[" * 100_000, "no list of cases"),
        (None, "can't be read"),
    ],
)
def test_a_list_that_can_not_be_trusted_is_refused(tmp_path: Path, change: object, said: str) -> None:
    touch(tmp_path, *(f"data/{name}/{image}.nii.gz" for name in "ab" for image in ("dwi", "adc")))
    path = listed(tmp_path / "data", tmp_path / "jobs")
    if callable(change):
        path.write_text(change(path.read_text()))
    else:
        path.unlink()
    with pytest.raises(InputRefused, match=said) as refused:
        read_case_list(path, tmp_path / "data")
    assert "slurm DATASET OUT" in refused.value.do


def test_a_dataset_that_is_not_mounted_is_refused_at_once_and_no_case_fails_for_it(
    tmp_path: Path, weights: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    touch(data, "a/dwi.nii.gz", "a/adc.nii.gz")
    cases = BatchCases(data, case_list=listed(data, tmp_path / "jobs"))
    other = tmp_path / "other"
    touch(other, "a/dwi.nii.gz")
    with pytest.raises(InputRefused, match="of another dataset"):
        run_batch(replace(cases, path=other), out, weights)
    data.rename(tmp_path / "unmounted")
    with pytest.raises(InputRefused, match="dataset can't be read") as refused:
        run_batch(cases, out, weights)
    assert "mounted" in refused.value.do
    data.mkdir()
    with pytest.raises(InputRefused, match="dataset can't be read"):
        run_batch(cases, out, weights)
    assert not out.exists()


def test_a_dataset_may_be_a_link_there_and_a_folder_here_as_in_a_container(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "a/dwi.nii.gz", "a/adc.nii.gz")
    data = tmp_path / "data"
    data.symlink_to(tmp_path / "disk")
    path = listed(data, tmp_path / "jobs")
    data.unlink()
    (tmp_path / "disk").rename(data)
    (case,) = read_case_list(path, data)
    assert [file.relative_to(data).as_posix() for file in case.files.values()] == ["a/dwi.nii.gz", "a/adc.nii.gz"]


def test_the_json_of_a_dry_run_stands_alone(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "family_of", lambda spec: type("F", (), {"networks": staticmethod(lambda _: [])}))
    data = tmp_path / "data"
    touch(data, "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/dwi/sub-2_dwi.nii.gz")
    words = ["batch", str(data), str(tmp_path / "out"), "--weights", str(weights), "--dry-run", "--json", "--case-list"]
    assert main([*words, str(listed(data, tmp_path / "jobs"))]) == 3
    assert json.loads(capsys.readouterr().out)["total"]["cases"] == 2


def test_another_list_leaves_the_one_of_jobs_that_wait(tmp_path: Path) -> None:
    touch(tmp_path / "data", "a/dwi.nii.gz", "a/adc.nii.gz")
    first = listed(tmp_path / "data", tmp_path / "jobs")
    assert listed(tmp_path / "data", tmp_path / "jobs") == first
    touch(tmp_path / "data", "b/dwi.nii.gz", "b/adc.nii.gz")
    second = listed(tmp_path / "data", tmp_path / "jobs")
    assert [len(read_case_list(path, tmp_path / "data")) for path in (first, second)] == [1, 2]


def test_a_filter_of_images_and_a_list_contradict_each_other(tmp_path: Path) -> None:
    data = write_bids(tmp_path / "data", {"1": ("",)})
    (tmp_path / "filter.json").write_text("{}")
    words = [str(data), str(tmp_path / "out"), "participant", "--case-list", str(listed(data, tmp_path / "jobs"))]
    assert main([*words, "--bids-filter-file", str(tmp_path / "filter.json")]) == 2
