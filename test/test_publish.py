"""All outputs or none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import ensemble.publish
from conftest import GRID, REPOSITORY, phantom_lesion, tree
from ensemble.errors import UsageError
from ensemble.folders import exclusive_writer
from ensemble.outputs.formats.image import write as write_volume
from ensemble.publish import check_writable, publish, write_json, write_text_atomically
from ensemble.volume import Volume, grid_of


def test_files_arrive_and_nothing_else_stays(tmp_path: Path) -> None:
    root = tmp_path / "a" / "out"
    with publish(root) as staging:
        (staging / "images").mkdir()
        (staging / "images" / "mask.txt").write_text("mask")
        (staging / "results.json").write_text("[]")
        assert not (root / "results.json").exists()
    assert tree(root) == {"images": b"<folder>", "images/mask.txt": b"mask", "results.json": b"[]"}


def test_older_outputs_are_replaced_and_others_kept(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with publish(tmp_path) as staging:
        (staging / "results.json").write_text("new")
    assert tree(tmp_path) == {"notes.txt": b"mine", "results.json": b"new"}


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "results.json").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(type(error)), publish(tmp_path) as staging:
        (staging / "results.json").write_text("new")
        raise error
    assert tree(tmp_path) == before
    with pytest.raises(type(error)), publish(tmp_path / "b" / "c"):
        raise error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", range(5))
def test_a_move_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Three files, of which two replace older ones, take five moves: let each of them fail in turn."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.mha").write_text("old a")
    (tmp_path / "results.json").write_text("old results")
    before, moves, really = tree(tmp_path), iter(range(100)), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if next(moves) == failing:
            raise OSError(errno.ENOSPC, "no space left")
        return really(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UsageError, match="no space left"), publish(tmp_path) as staging:
        for name in ("images/a.mha", "new/b.mha", "results.json"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text("new")
    assert tree(tmp_path) == before


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="can't be written"), publish(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": b"a file"}


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz", ".nrrd"])
def test_masks_keep_voxels_and_geometry(tmp_path: Path, suffix: str) -> None:
    write_volume(Volume(phantom_lesion(), GRID), tmp_path / f"mask{suffix}")
    image = sitk.ReadImage(str(tmp_path / f"mask{suffix}"))
    assert image.GetPixelID() == sitk.sitkUInt8
    assert np.array_equal(sitk.GetArrayFromImage(image), phantom_lesion().astype(np.uint8))
    assert GRID.distance_voxels(grid_of(image)) < 1e-5
    if suffix == ".mha":
        assert grid_of(image) == GRID
        assert b"CompressedData = True" in (tmp_path / "mask.mha").read_bytes()[:600]


def test_a_disk_that_swallows_data_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", lambda image, path, **how: really(image * 0, path, **how))
    with pytest.raises(OSError, match="read back"):
        write_volume(Volume(phantom_lesion(), GRID), tmp_path / "mask.mha")


def test_an_unwritable_place_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "mask.mha").mkdir()
    with pytest.raises(OSError, match="could not be written"):
        write_volume(Volume(phantom_lesion(), GRID), tmp_path / "mask.mha")


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"x": float("nan")}, tmp_path / "x.json")


def test_what_an_earlier_case_left_goes_in_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    for name in ("mask.nii.gz", "members/a_mask.mha", "mine.nii.gz"):
        (tmp_path / name).write_text("old")
    before = tree(tmp_path)
    earlier = ("mask.nii.gz", "members/a_mask.mha", "gone.mha")
    with pytest.raises(KeyboardInterrupt), publish(tmp_path, earlier):
        raise KeyboardInterrupt
    assert tree(tmp_path) == before
    with publish(tmp_path, earlier) as staging:
        (staging / "mask.mha").write_text("new")
    assert tree(tmp_path) == {"mask.mha": b"new", "members": b"<folder>", "mine.nii.gz": b"old"}


def test_two_may_replace_a_text_at_once_whatever_their_process_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container's process, of the same id, comes in between."""
    path, scratch = tmp_path / "summary.csv", tmp_path / "scratch"
    scratch.mkdir()
    really, others = ensemble.publish.flush_to_disk, iter(["other"])

    def to_disk(draft: Path) -> None:
        for text in others:
            write_text_atomically(path, text, scratch)
        assert draft.read_text() in ("mine", "other")
        really(draft)

    monkeypatch.setattr(ensemble.publish, "flush_to_disk", to_disk)
    write_text_atomically(path, "mine", scratch)
    assert path.read_text() == "mine"
    (beside := tmp_path / "beside").touch()
    assert path.stat().st_mode == beside.stat().st_mode, "as readable as any other file"
    assert tree(scratch) == {}


def test_a_folder_in_the_place_of_an_output_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "mask.mha").mkdir()
    (tmp_path / "mask.mha" / "mine").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="can't be written"), publish(tmp_path) as staging:
        (staging / "mask.mha").write_text("new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at", range(5))
def test_a_signal_while_files_move_undoes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    moves, really = iter(range(100)), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if next(moves) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return really(self, target)

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("old")
    before = signal.signal(signal.SIGTERM, terminate)
    monkeypatch.setattr(Path, "replace", replace)
    try:
        with pytest.raises(SystemExit, match="143"), publish(tmp_path) as staging:
            for name in "abc":
                (staging / name).write_text("new")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert tree(tmp_path) == dict.fromkeys("ab", b"old")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return really(self, target)

    really, before = Path.replace, signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(Path, "replace", replace)
    try:
        with publish(tmp_path) as staging:
            (staging / "a").write_text("new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert tree(tmp_path) == {"a": b"new"}


def test_a_geometry_that_the_format_can_not_hold_is_noticed(tmp_path: Path) -> None:
    sheared = replace(GRID, direction=(1.0, 0.0, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="can't hold this geometry"):
        write_volume(Volume(phantom_lesion(), sheared), tmp_path / "mask.nii.gz")


def test_asking_whether_a_place_is_writable_changes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert tree(tmp_path) == {}
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        check_writable(tmp_path / "file")
    with pytest.raises(UsageError):
        check_writable(tmp_path / ("x" * 300))


def test_a_second_writer_is_refused_by_whatever_path_it_comes(tmp_path: Path) -> None:
    out, alias = tmp_path / "out", tmp_path / "alias"
    alias.symlink_to(out)
    with exclusive_writer(out):
        for path in (out, alias, tmp_path / "x" / ".." / "out", out / "."):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(UsageError, match="another process") as refusal, exclusive_writer(path):
                raise AssertionError
            assert refusal.value.exit_code == 2
        with exclusive_writer(tmp_path / "other"), publish(out) as staging:
            (staging / "mask").touch()
    assert set(tree(tmp_path)) == {"alias", "out", "out/mask", "x"}
    with exclusive_writer(alias):
        pass
    assert set(tree(tmp_path)) == {"alias", "out", "out/mask", "x"}


def test_a_folder_made_for_outputs_that_never_came_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), exclusive_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise RuntimeError
    assert tree(tmp_path) == {}


def test_who_is_refused_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found no folder and made it; the other one was quicker with the lock."""
    out, really, others = tmp_path / "out", fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not others:
            others.append(os.open(out, os.O_RDONLY))
            really(others[0], fcntl.LOCK_EX)
        really(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match="another process"), exclusive_writer(out):
        pass
    os.close(others[0])
    assert set(tree(tmp_path)) == {"out"}


def test_a_folder_that_its_maker_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, really, times = tmp_path / "out", fcntl.flock, iter([True])

    def flock(descriptor: int, how: int) -> None:
        if next(times, False):
            out.rmdir()
        really(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_writer(out):
        monkeypatch.undo()
        with pytest.raises(UsageError, match="another process"), exclusive_writer(out):
            pass


def test_a_killed_writer_leaves_neither_lock_nor_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom ensemble.folders import exclusive_writer\n"
        "with exclusive_writer(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, out], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    assert tree(out) == {}
    with exclusive_writer(out):
        pass


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_noted_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level("INFO"), exclusive_writer(tmp_path / "out"):
        pass
    assert "can't be locked" in caplog.text


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_no_place_for_outputs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o300)
    with pytest.raises(UsageError, match="can't be written"), exclusive_writer(tmp_path / "out"):
        pass


def test_a_file_in_the_place_of_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="can't be written"), exclusive_writer(tmp_path / "out"):
        pass
