"""Whole batches: good cases are done, bad ones explained, and what ends a batch is told."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

import ensemble.publish
from batch_runs import BROKEN, comparable, rows, run_batch, write_case, write_dataset
from conftest import GRID, phantom_arrays, phantom_lesion, tree, write_image
from ensemble.batch.case_loop import CaseOutcome
from ensemble.batch.progress import open_progress
from ensemble.batch.run import segment_dataset
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import UsageError, WeightsBroken
from ensemble.metrics import dice
from ensemble.types import Modality
from ensemble.volume import grid_of

DWI, ADC = Modality.DWI, Modality.ADC


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


@pytest.mark.slow
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
        "README.md", "dataset_description.json", ".bidsignore", "summary.csv", "index.html", "failed",
        "sub-case000", "sub-case001",
    }  # fmt: skip
    assert len(list((out / "failed").iterdir())) == len(BROKEN)
    assert "[7/7]" in caplog.text
    assert "2 cases done (0 of them before or by another process), 5 failed" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.batch import case_loop

    data, really = tmp_path / "data", case_loop.read_case_files
    write_case(data / "a")

    def read(name: str, files: dict[Modality, Path]) -> object:
        raw = really(name, files)
        write_image(phantom_arrays()[DWI] * 2, files[DWI])
        return raw

    monkeypatch.setattr(case_loop, "read_case_files", read)
    assert run_batch(data, tmp_path / "out", weights) == 3
    assert "changed while it was being read" in rows(tmp_path / "out")["a"]["message"]


def test_a_bug_in_one_case_does_not_stop_the_others(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.batch import case_loop

    data, really = tmp_path / "data", case_loop.prepare_for_run
    for name in "abc":
        write_case(data / name)
    calls = iter(range(9))
    monkeypatch.setattr(case_loop, "prepare_for_run", lambda *given: really(*given) if next(calls) != 1 else 1 / 0)
    assert run_batch(data, tmp_path / "out", weights) == 1
    assert {case: row["status"] for case, row in rows(tmp_path / "out").items()} == {
        "a": "done",
        "b": "failed",
        "c": "done",
    }
    assert "ZeroDivisionError" in rows(tmp_path / "out")["b"]["message"]


@pytest.mark.slow
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
            really = ensemble.publish.flush_to_disk

            def full(path: Path) -> None:
                if ".batch" in path.parts and next(calls) >= 9:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                really(path)

            patch.setattr(ensemble.publish, "flush_to_disk", full)
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
        shown = open_progress(3)
        for case, status in (("a", "done"), ("b", "failed"), ("c", "kept")):
            shown.tell(CaseOutcome(case, status))  # type: ignore[arg-type]
        shown.close()
    said = b""
    with suppress(OSError):  # the end of a terminal that was closed
        while part := os.read(master, 4096):  # which gives what it holds in pieces
            said += part
    os.close(master)
    assert b"3/3" in said
    assert b"failed: 1" in said
    assert b"left" in said


def test_broken_weights_end_the_batch_before_it_begins(tmp_path: Path) -> None:
    write_case(tmp_path / "data" / "a")
    with pytest.raises(WeightsBroken):
        segment_dataset(tmp_path / "data", tmp_path / "out", RunConfig(weights=tmp_path / "none"), ExtraOutputs())
    assert not (tmp_path / "out").exists()
