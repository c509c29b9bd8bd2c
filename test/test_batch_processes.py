"""Batches of several processes: each case is done once, whoever dies when."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from batch_runs import comparable, rows, run_batch, start_batch, touch, write_case, write_dataset
from conftest import tree, write_contract_case
from ensemble.batch.claims import BatchClaims
from ensemble.cli import main
from ensemble.outputs.layouts.bids_entities import BidsEntities


def test_a_case_belongs_to_one_at_a_time_and_failures_are_shared(tmp_path: Path) -> None:
    first, second, other = (BatchClaims(tmp_path, recipe) for recipe in ("x", "x", "y"))
    lock = first.claim(BidsEntities("1"))
    assert lock is not None
    assert second.claim(BidsEntities("1")) is None
    first.note_failure(BidsEntities("1"), {"message": "x", "exit_code": 3})
    first.release(lock)
    assert second.failure(BidsEntities("1")) == {"message": "x", "exit_code": 3}
    assert other.failure(BidsEntities("1")) is None, "with other options it may succeed"
    other.leave()
    assert second.claim(BidsEntities("1")) is not None
    first.leave()
    assert (tmp_path / ".batch").exists(), "somebody is still there"
    second.leave()
    assert tree(tmp_path) == {}


def test_what_a_dead_process_left_is_gone_with_the_next_session(tmp_path: Path) -> None:
    touch(tmp_path, ".batch/unfinished-x/mask", ".batch/notes-x/sub-1.json", ".batch/session.lock")
    session = BatchClaims(tmp_path, "x")
    assert set(tree(tmp_path)) == {".batch", ".batch/session.lock"}
    session.leave()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    from ensemble.batch import case_loop

    data, really, calls = tmp_path / "data", case_loop.segment_prepared, iter(range(9))
    for name in "abcd":
        write_case(data / name)

    def predict(*arguments: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(case_loop, "segment_prepared", predict)
    with pytest.raises(KeyboardInterrupt):
        run_batch(data, tmp_path / "out", weights)
    statuses = {case: row["status"] for case, row in rows(tmp_path / "out").items()}
    assert statuses["a"] == "done"
    assert statuses["c"] == statuses["d"] == "not done"
    assert not (tmp_path / "out" / ".batch").exists()
    monkeypatch.undo()
    assert run_batch(data, tmp_path / "out", weights) == 0
    monkeypatch.setattr(case_loop, "segment_prepared", predict)
    calls = iter((2,))
    with pytest.raises(KeyboardInterrupt):
        run_batch(data, tmp_path / "out", weights, resume=False)
    last = rows(tmp_path / "out")["d"]
    assert (last["status"], last["lesions"]) == ("earlier result", "1")
    assert (tmp_path / "out" / last["mask"]).is_file()


@pytest.mark.slow
def test_the_command(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From outside, with networks that are really loaded."""
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
    assert main(["batch", str(tmp_path / "data"), str(tmp_path / "one"), *common, "--no-resume"]) == 0
    assert main(["batch", str(tmp_path / "gone"), str(tmp_path / "three"), *common]) == 3
    assert not (tmp_path / "three").exists()
    assert "the dataset does not exist" in capsys.readouterr().out
