"""No command replaces a file that is not its own, nor writes where another one is writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import GRID, phantom_arrays, tree, write_image
from ensemble.cli import main
from ensemble.errors import UsageError
from ensemble.folders import exclusive_writer
from ensemble.outputs.foreign import refuse_overwriting_foreign_files
from ensemble.types import Modality

FOREIGN = (
    "mask.nii.gz",
    "mask.nii",
    "mask.nrrd",
    "votes.mha",
    "probability.nii.gz",
    "members/rater1_mask.nii.gz",
    "members/a/b.mha",
)


def case_files(folder: Path, dwi: str = "dwi.mha") -> list[str]:
    arrays = phantom_arrays()
    dwi_path = write_image(arrays[Modality.DWI], folder / dwi)
    return ["--dwi", str(dwi_path), "--adc", str(write_image(arrays[Modality.ADC], folder / "adc.mha"))]


@pytest.mark.parametrize("name", [*FOREIGN, "report.json", "report.html", "overlay.png"])
def test_a_file_of_others_is_not_replaced(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A radiologist's mask.nii.gz in the folder of the results was replaced, one called mask.nrrd removed, with exit code 0."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("of a radiologist")
    before = tree(out)
    assert main(["run", *case_files(tmp_path / "in"), "--out", str(out), "--device", "cpu"]) == 2
    assert tree(out) == before
    assert name in capfd.readouterr().err


def test_results_of_an_earlier_run_make_way_and_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "dwi.nii.gz").write_text("an image that is not in the way")
    refuse_overwriting_foreign_files(tmp_path, [tmp_path / "dwi.nii.gz"])
    for name in FOREIGN[:1]:
        (tmp_path / name).write_text("ours")
    with pytest.raises(UsageError):
        refuse_overwriting_foreign_files(tmp_path, [])
    for content in ("{", "[]", "{}", json.dumps({"tool": {"name": "another"}}), json.dumps({"tool": 5})):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(UsageError, match="did not write"):
            refuse_overwriting_foreign_files(tmp_path, [])
    (tmp_path / "report.json").write_text(json.dumps({"tool": {"name": "isles-ensemble"}}))
    refuse_overwriting_foreign_files(tmp_path, [])


@pytest.mark.parametrize("linked", [False, True])
def test_an_image_that_is_read_is_not_replaced(tmp_path: Path, linked: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A DWI called mask.mha in the folder of the results was removed, with exit code 0."""
    out = tmp_path / "out"
    files = case_files(out, "mask.mha")
    (out / "report.json").write_text(json.dumps({"tool": {"name": "isles-ensemble"}}))
    before = tree(out)
    if linked:
        (tmp_path / "dwi.mha").symlink_to(out / "mask.mha")
        files[1] = str(tmp_path / "dwi.mha")
    assert main(["run", *files, "--out", str(out), "--device", "cpu"]) == 2
    assert tree(out) == before
    assert "mask.mha" in capfd.readouterr().err


def test_a_batch_and_a_run_do_not_write_to_one_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both ended with 0; batches among themselves share a folder."""
    case_files(tmp_path / "data" / "p1")
    out = tmp_path / "out"
    with exclusive_writer(out):
        assert main(["batch", str(tmp_path / "data"), str(out), "--device", "cpu"]) == 2
        assert tree(out) == {}
    assert "another process is writing" in capfd.readouterr().err
    with exclusive_writer(out, shared=True):
        with exclusive_writer(out, shared=True):
            pass
        assert main(["run", *case_files(tmp_path / "in"), "--out", str(out), "--device", "cpu"]) == 2
    assert "another process is writing" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["case,dwi,adc\na,b,c\n", "a mask"])
@pytest.mark.parametrize("name", ["metrics.csv", "metrics_summary.csv"])
def test_evaluate_replaces_only_what_evaluate_has_written(tmp_path: Path, content: str, name: str) -> None:
    """A worklist, a mask or the summary of a batch that was named as --out was replaced."""
    mask = np.zeros(GRID.shape_zyx, np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    masks = [str(write_image(mask, tmp_path / side / "1.nii.gz").parent) for side in ("p", "t")]
    out = tmp_path / "metrics.csv"
    assert main(["evaluate", *masks, "--out", str(out)]) == 0
    assert main(["evaluate", *masks, "--out", str(out)]) == 0
    (tmp_path / name).write_text(content)
    before = tree(tmp_path)
    assert main(["evaluate", *masks, "--out", str(out)]) == 2
    assert tree(tmp_path) == before
