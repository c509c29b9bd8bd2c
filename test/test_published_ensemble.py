"""The whole published ensemble, SEALS, NVAUTO and SWAN, from one folder as DeepISLES' archive: in `run`, `batch` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batch_runs import rows
from conftest import phantom_arrays, write_contract_case, write_image
from ensemble.cli import main
from ensemble.readers.imagefile import read_image
from ensemble.types import AnyArray, Modality
from nvauto_files import PUBLISHED as NVAUTO
from nvauto_files import save_script, write_tiny
from swan_folders import PUBLISHED as SWAN
from swan_folders import build_swan_folder
from test_serve import serving
from v1_folders import PUBLISHED as SEALS
from v1_folders import V1Spec, build_v1_folder

NETWORKS = {"seals": 1, "nvauto": 2, "swan": 2}
OPTIONS = ("--device", "cpu", "--tta", "none", "--allow-torchscript")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepISLES' `weights/` with small networks: fewer folds, too, which a run has to say."""
    root = tmp_path_factory.mktemp("deepisles") / "weights"
    build_v1_folder(root / SEALS, V1Spec(folds=("fold_0",), features=2, patch=(64, 96, 80)))
    write_tiny(root, numbers=range(2))
    build_swan_folder(root / SWAN, folds=("0",))
    return root


class Dead(nn.Module):
    """A network whose answers are no numbers."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return windows * torch.inf * 0.0


def with_a_dead_network(archive: Path, root: Path) -> Path:
    """The same archive, but one of NVAUTO's networks is dead."""
    for part in archive.iterdir():
        (root / part.name).parent.mkdir(exist_ok=True)
        if part.name == NVAUTO.parts[0]:
            write_tiny(root, numbers=[0])
            save_script(Dead(), root / NVAUTO / "model1.ts")
        else:
            (root / part.name).symlink_to(part)
    return root


def write_images(folder: Path, *, flair: bool = True) -> dict[str, str]:
    """The phantom's files by modality, as a pipeline of the hospital might name them."""
    arrays = phantom_arrays()
    if flair:
        arrays[Modality.FLAIR] = arrays[Modality.DWI] * 0.5
    return {str(m): str(write_image(array, folder / f"{m}.nii.gz")) for m, array in arrays.items()}


def run(tmp_path: Path, weights: Path, *options: str, flair: bool = True) -> tuple[int, dict[str, Any]]:
    """Exit code of `run` on the phantom, and what its report says of each member."""
    files = [word for m, path in write_images(tmp_path / "in", flair=flair).items() for word in (f"--{m}", path)]
    code = main(["run", *files, "--out", str(tmp_path / "out"), "--weights", str(weights), *OPTIONS, *options])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    return code, {member["name"]: member for member in report["members"]}


def array(path: Path) -> AnyArray:
    return read_image(path, Modality.DWI).volume.array


@pytest.mark.slow
def test_a_case_gets_the_majority_of_the_three(
    tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, members = run(tmp_path, archive, "--save-member-masks", "--speck-ml", "0")
    said = capfd.readouterr()
    assert (code, said.err) == (0, "")
    assert all(f"note: member {name}: without fold" in said.out for name in NETWORKS)
    assert {name: (member["status"], member["networks"]) for name, member in members.items()} == {
        name: ("voted", networks) for name, networks in NETWORKS.items()
    }
    votes = sum(array(tmp_path / "out" / "members" / f"{name}_mask.nii.gz") > 0 for name in NETWORKS)
    mask = array(tmp_path / "out" / "mask.nii.gz") > 0
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(mask, votes >= 2)


@pytest.mark.slow
def test_without_flair_two_vote_and_swan_is_on_record(tmp_path: Path, archive: Path) -> None:
    code, members = run(tmp_path, archive, flair=False)
    assert code == 0
    assert {name: member["status"] for name, member in members.items()} == {
        "seals": "voted", "nvauto": "voted", "swan": "not applicable",
    }  # fmt: skip
    assert "FLAIR" in members["swan"]["reason"]


@pytest.mark.slow
def test_a_dead_member_is_an_outcome_on_record(tmp_path: Path, archive: Path) -> None:
    weights = with_a_dead_network(archive, tmp_path / "weights")
    code, members = run(tmp_path, weights, "--min-members", "2")
    assert code == 0
    assert {name: member["status"] for name, member in members.items()} == {
        "seals": "voted", "nvauto": "failed", "swan": "voted",
    }  # fmt: skip
    assert "not finite" in members["nvauto"]["reason"]


@pytest.mark.slow
def test_a_batch_gives_the_mask_of_a_single_run(tmp_path: Path, archive: Path) -> None:
    assert run(tmp_path, archive)[0] == 0
    write_images(tmp_path / "set" / "one")
    write_images(tmp_path / "set" / "two", flair=False)
    out = tmp_path / "batch"
    assert main(["batch", str(tmp_path / "set"), str(out), "--weights", str(archive), *OPTIONS]) == 0
    table = rows(out)
    assert {case: set(row["voters"].split()) for case, row in table.items()} == {
        "one": {"seals", "nvauto", "swan"},
        "two": {"seals", "nvauto"},
    }
    np.testing.assert_array_equal(array(out / table["one"]["mask"]), array(tmp_path / "out" / "mask.nii.gz"))


@pytest.mark.slow
def test_a_server_gives_the_mask_of_a_single_call(tmp_path: Path, archive: Path) -> None:
    case, out = write_contract_case(tmp_path / "in", flair=True), tmp_path / "once"
    assert main(["--input", str(case), "--output", str(out), "--weights", str(archive), *OPTIONS]) == 0
    with serving(tmp_path, archive, "--tta", "none", "--allow-torchscript") as server:
        server.await_ready()
        status, answer = server.invoke()
    assert (status, set(answer["voted"])) == (201, {"seals", "nvauto", "swan"})
    mask = Path("images") / "stroke-lesion-segmentation" / "case-1.mha"
    np.testing.assert_array_equal(array(tmp_path / "out" / mask), array(out / mask))
