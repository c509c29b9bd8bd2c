"""Batches that are called again: what still holds is kept, what does not is made anew or moves aside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from batch_runs import rows, run_batch, touch, write_case
from conftest import phantom_arrays, tree, write_image
from ensemble.batch.identity import input_digests
from ensemble.errors import InputRefused, UsageError, WeightsBroken
from ensemble.readers.sources import image_stamps, source_files
from ensemble.types import Modality

DWI = Modality.DWI


def test_all_files_of_an_image_count(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(phantom_arrays()[DWI])
    for ending, data in ((".mhd", "x.raw"), (".nhdr", "x.raw.gz")):
        header = tmp_path / f"x{ending}"
        sitk.WriteImage(image, str(header), useCompression=ending == ".nhdr")
        assert [name for name, _ in source_files(header)] == [header.name, data]
        before, state = input_digests({DWI: header}), image_stamps([header])
        (tmp_path / data).write_bytes(b"other")
        assert input_digests({DWI: header}) != before
        assert image_stamps([header]) != state
    assert [name for name, _ in source_files(tmp_path)] == ["x.mhd", "x.nhdr", "x.raw", "x.raw.gz"]
    with pytest.raises(InputRefused, match="can't be read"):
        input_digests({DWI: tmp_path / "gone.nii.gz"})


@pytest.mark.slow
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
    assert "an earlier result remains" in rows(out)["a"]["message"]
    (data / "list.csv").unlink()
    assert run_batch(data, out, weights) == 0
    assert tree(out / "sub-a") == kept
    assert rows(out)["a"]["status"] == "not in the dataset"
