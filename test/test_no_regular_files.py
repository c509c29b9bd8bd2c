"""What stands where a file belongs and is none: FIFOs, sockets, devices, folders, links to nowhere or out of their folder."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batch_runs import run_batch, write_weights
from conftest import GRID, phantom_arrays, phantom_lesion, write_contract_case, write_final_error_line, write_image
from contained import assert_refused, contained
from dicom_files import write_series
from ensemble.batch.find import find_cases
from ensemble.batch.identity import input_digests
from ensemble.cli import main
from ensemble.contract.isles22 import find_inputs
from ensemble.errors import InputRefused
from ensemble.evaluate.scores import read_mask
from ensemble.members.manifest import find_members
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.readers.inspect import inspect_path
from ensemble.types import Modality
from ensemble.volume import Volume
from nnunet_folders import FolderSpec, build_folder

DWI = phantom_arrays()[Modality.DWI]


def a_socket(path: Path) -> None:
    """A Unix socket's name is at most 107 bytes long."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "FIFO"),
    "socket": (a_socket, "socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "device"),
    "link to nowhere": (
        lambda path: path.symlink_to("../.git/annex/objects/X/MD5E-s12--abc"),
        "link to a file that does not exist",
    ),
    "link to itself": (lambda path: path.symlink_to(path.name), "link"),
}
NAMES = ("a.nii.gz", "a.nii", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.zip", "a.dcm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file_is_refused_and_named(tmp_path: Path, kind: str, name: str) -> None:
    make, said = KINDS[kind]
    make(tmp_path / name)
    outcome = contained(lambda: read_image(tmp_path / name, Modality.DWI), seconds=10)
    assert_refused(outcome, 3, said)
    assert not [word for word in ("damaged", "permission", "right") if word in outcome.text], outcome


@pytest.mark.parametrize("kind", KINDS)
def test_b_values_that_are_no_regular_file_are_not_passed_over(tmp_path: Path, kind: str) -> None:
    make, said = KINDS[kind]
    path = write_image(DWI, tmp_path / "dwi.nii.gz")
    make(tmp_path / "dwi.bval")
    outcome = contained(lambda: read_image(path, Modality.DWI), seconds=10)
    assert_refused(outcome, 3, said)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to nowhere"])
@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_voxels_that_are_no_regular_file_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = write_image(DWI, tmp_path / name)
    (data,) = (file for file in tmp_path.iterdir() if file != path)
    data.unlink()
    KINDS[kind][0](data)
    outcome = contained(lambda: read_image(path, Modality.DWI), seconds=10)
    assert_refused(outcome, 3, KINDS[kind][1])


def test_a_folder_called_like_an_image_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "dwi.nii.gz").mkdir()
    with pytest.raises(InputRefused, match=r"no DICOM images|folder"):
        read_image(tmp_path / "dwi.nii.gz", Modality.DWI)
    (tmp_path / "dwi.bval").mkdir()
    with pytest.raises(InputRefused, match="folder"):
        read_image(write_image(DWI, tmp_path / "dwi.mha"), Modality.DWI)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_what_is_no_file_in_a_dicom_folder_is_not_opened(tmp_path: Path, kind: str) -> None:
    write_series(Volume(DWI, GRID), tmp_path, description="DWI")
    KINDS[kind][0](tmp_path / "zzz.dcm")
    outcome = contained(lambda: read_image(tmp_path, Modality.DWI), seconds=10)
    assert outcome.exit_code in (0, 3), outcome
    assert contained(lambda: input_digests({Modality.DWI: tmp_path}), seconds=10).exit_code == 0


def test_a_slice_that_is_a_link_to_nowhere_is_missed(tmp_path: Path) -> None:
    """The last one of a series would be missed by nobody: so does a data set look of which not all was fetched."""
    files = write_series(Volume(DWI, GRID), tmp_path / "series", description="DWI")
    files[-1].unlink()
    files[-1].symlink_to("../.git/annex/objects/X")
    with pytest.raises(InputRefused, match="link to a file that does not exist") as refusal:
        read_image(tmp_path / "series", Modality.DWI)
    assert files[-1].name in refusal.value.where


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["case-1.mha", "case-1.zip"])
def test_the_contract_refuses_what_is_no_regular_file(tmp_path: Path, kind: str, name: str) -> None:
    root = write_contract_case(tmp_path / "in")
    (folder := root / "images" / "dwi-brain-mri").joinpath("case-1.mha").unlink()
    KINDS[kind][0](folder / name)

    def read() -> None:
        found = find_inputs(root)
        read_case_files(found.name, found.files)

    outcome = contained(read, seconds=10)
    assert_refused(outcome, 3, KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_batch_refuses_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    for modality, array in phantom_arrays().items():
        write_image(array, tmp_path / "set" / "case" / f"{modality}.nii.gz")
    (tmp_path / "set" / "case" / "dwi.nii.gz").unlink()
    KINDS[kind][0](tmp_path / "set" / "case" / "dwi.nii.gz")
    weights, out = write_weights(tmp_path / "weights"), tmp_path / "out"
    outcome = contained(lambda: os._exit(0) if run_batch(tmp_path / "set", out, weights) != 3 else None, seconds=30)
    assert outcome.exit_code == 0
    assert KINDS[kind][1] in (out / "summary.csv").read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "checkpoint_final.pth", "manifest.json", "member.json"])
def test_weights_that_are_no_regular_file_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    folder = build_folder(tmp_path / "weights" / "member", FolderSpec())
    place = next(folder.rglob(name), tmp_path / "weights" / name if name == "manifest.json" else folder / name)
    place.unlink(missing_ok=True)
    KINDS[kind][0](place)

    def load() -> None:
        from ensemble.config import RunConfig
        from ensemble.pipeline import load_from_config

        load_from_config(RunConfig(weights=tmp_path / "weights", device="cpu"))

    outcome = contained(load, seconds=20)
    assert outcome.exit_code == 4, outcome


def test_pickles_and_packed_weights_that_are_fifos_are_refused(tmp_path: Path) -> None:
    from ensemble.weights.packed import read_packed
    from ensemble.weights.pickles import read_pickle

    os.mkfifo(tmp_path / "x")
    for read in (read_pickle, read_packed):
        outcome = contained(lambda: read(tmp_path / "x"), seconds=10)  # type: ignore[operator]  # noqa: B023
        assert_refused(outcome, 4, "FIFO")


def test_a_mask_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mask.nii.gz")
    outcome = contained(lambda: read_mask(tmp_path / "mask.nii.gz", "mask"), seconds=10)
    assert outcome.kind == "InputRefused", outcome


@pytest.mark.parametrize("name", ["fifo.nii.gz", "fifo.dcm", "fifo.zip"])
def test_inspect_does_not_wait_for_a_fifo(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert contained(lambda: inspect_path(tmp_path / name, None), seconds=10).exit_code == 0


OUT_OF_THE_FOLDER = ("{outside}", "../data.raw", "sub/../../data.raw", "LIST", "data%03d.raw 1 3 1", "-")


@pytest.mark.parametrize("named", OUT_OF_THE_FOLDER)
@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_header_that_points_out_of_its_folder_is_refused(tmp_path: Path, name: str, named: str) -> None:
    path = write_image(DWI, tmp_path / "in" / name)
    (data,) = (file for file in path.parent.iterdir() if file != path)
    shutil.move(data, tmp_path / "data.raw")
    named = named.format(outside=tmp_path / "data.raw")
    path.write_text(path.read_text().replace(data.name, named))
    outcome = contained(lambda: read_image(path, Modality.DWI), seconds=10)
    assert_refused(outcome, 3, named.split()[0])
    assert "damaged" not in outcome.text


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_header_may_name_a_file_in_a_folder_below(tmp_path: Path, name: str) -> None:
    path = write_image(DWI, tmp_path / name)
    (data,) = (file for file in tmp_path.iterdir() if file != path)
    (tmp_path / "below").mkdir()
    shutil.move(data, tmp_path / "below" / data.name)
    path.write_text(path.read_text().replace(data.name, f"below/{data.name}"))
    assert np.array_equal(read_image(path, Modality.DWI).volume.array, DWI)


def test_a_link_that_leaves_its_folder_is_followed_and_noted(tmp_path: Path) -> None:
    target = write_image(DWI, tmp_path / "store" / "17.nii.gz")
    (tmp_path / "set").mkdir()
    (link := tmp_path / "set" / "dwi.nii.gz").symlink_to(target)
    image = read_image(link, Modality.DWI)
    assert any(f"read through a link to {target}" in note for note in image.notes), image.notes


def test_a_link_in_its_folder_and_one_of_git_annex_need_no_note(tmp_path: Path) -> None:
    annexed = write_image(DWI, tmp_path / ".git" / "annex" / "objects" / "X" / "MD5E.nii.gz")
    (tmp_path / "dwi.nii.gz").symlink_to(annexed)
    (tmp_path / "same.nii.gz").symlink_to("dwi.nii.gz")
    for name in ("dwi.nii.gz", "same.nii.gz"):
        assert not read_image(tmp_path / name, Modality.DWI).notes


def test_a_dicom_folder_with_links_out_of_it_is_noted(tmp_path: Path) -> None:
    for file in write_series(Volume(DWI, GRID), tmp_path / "store", description="DWI"):
        (tmp_path / "series").mkdir(exist_ok=True)
        (tmp_path / "series" / file.name).symlink_to(file)
    notes = read_image(tmp_path / "series", Modality.DWI).notes
    assert any(f"{GRID.size[2]} of its files" in note and "link" in note for note in notes), notes


def test_a_data_set_whose_links_leave_it_is_said_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for modality, array in phantom_arrays().items():
        write_image(array, tmp_path / "store" / "case" / f"{modality}.nii.gz")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "sub-1").symlink_to(tmp_path / "store" / "case")
    with caplog.at_level("INFO", "ensemble"):
        (case,) = find_cases(tmp_path / "set", tmp_path / "out")
    assert len(case.files) == 2
    assert str(tmp_path / "store") in caplog.text


def test_a_dangling_link_is_no_missing_image(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_contract_case(tmp_path / "in")
    (dwi := root / "images" / "dwi-brain-mri" / "case-1.mha").unlink()
    dwi.symlink_to("../gone.mha")
    assert main(["--input", str(root), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 3
    word = write_final_error_line(capfd.readouterr().err)
    assert all(said in word for said in ("link to a file that does not exist", "gone.mha", str(dwi)))


def test_masks_through_links_are_still_compared(tmp_path: Path) -> None:
    target = write_image(phantom_lesion().astype(np.uint8), tmp_path / "store" / "mask.nii.gz")
    (tmp_path / "mask.nii.gz").symlink_to(target)
    assert read_mask(tmp_path / "mask.nii.gz", "mask").array.any()


def test_a_fifo_in_the_place_of_a_manifest_is_no_absent_manifest(tmp_path: Path) -> None:
    build_folder(tmp_path / "member", FolderSpec())
    os.mkfifo(tmp_path / "manifest.json")
    assert contained(lambda: find_members(tmp_path), seconds=10).exit_code == 4


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to nowhere"])
def test_a_worklist_that_is_no_regular_file_is_named(tmp_path: Path, kind: str) -> None:
    KINDS[kind][0](tmp_path / "list.csv")
    assert_refused(
        contained(lambda: find_cases(tmp_path / "list.csv", tmp_path / "out"), seconds=10), 3, KINDS[kind][1]
    )


def test_a_name_that_no_file_can_have_fails_its_case_alone(tmp_path: Path) -> None:
    for modality, array in phantom_arrays().items():
        write_image(array, tmp_path / f"{modality}.nii.gz")
    (tmp_path / "list.csv").write_text("case,dwi,adc\ngood,dwi.nii.gz,adc.nii.gz\nodd,d\0wi.nii.gz,adc.nii.gz\n")
    with pytest.raises(InputRefused, match="can't be read"):
        read_image(Path("a\0.nii.gz"), Modality.DWI)
    assert run_batch(tmp_path / "list.csv", tmp_path / "out", write_weights(tmp_path / "weights")) == 3
    assert "bug" not in (tmp_path / "out" / "summary.csv").read_text()
