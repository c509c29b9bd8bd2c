"""`batch --dry-run`: what headers refuse, and what the rest is expected to cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_runs import run_batch, write_case
from conftest import phantom_arrays, tree, write_image
from ensemble.batch.estimate import CostModel
from ensemble.cli import main
from ensemble.families.base import NetworkSpec
from ensemble.readers.stored import read_grid, read_stored
from ensemble.types import Modality
from nnunet_folders import FolderSpec, build_folder


def _network(weights: Path, patch: tuple[int, ...]) -> NetworkSpec:
    return NetworkSpec(weights, 2, (2.0,) * len(patch), patch, patch, 2**30, "", lambda: None)  # type: ignore[arg-type, return-value]


def test_time_grows_with_windows_and_flips_but_not_beyond_a_brain(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(1000))

    def seconds(size: tuple[int, ...], *patch: int, mirrored: bool = False) -> float:
        model = CostModel([_network(tmp_path / "w", patch)], mirrored, findings=False, factor=1.0)
        return model.cpu_seconds(size, (2.0, 2.0, 2.0)) - CostModel([], False, False, 1.0).cpu_seconds(size, (2.0,) * 3)

    one = seconds((80, 80, 80), 80, 80, 80)
    assert seconds((80, 81, 80), 80, 80, 80) == pytest.approx(2 * one)
    assert seconds((80, 80, 80), 80, 80, 80, mirrored=True) == pytest.approx(8 * one)
    assert seconds((40, 40, 40), 80, 80) == pytest.approx(40 * one), "a window a slice"
    assert seconds((40, 40, 40), 80, 80, mirrored=True) == pytest.approx(160 * one)
    assert seconds((500, 500, 500), 80, 80, 80) == seconds((100, 100, 100), 80, 80, 80)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_a_header_alone_says_where_an_image_lies(tmp_path: Path, suffix: str) -> None:
    path = write_image(phantom_arrays()[Modality.DWI], tmp_path / f"dwi{suffix}")
    assert read_grid(path, "DWI") == read_stored(path, "DWI").grid


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_folder(tmp_path / "real" / "first", FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0)))
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "good")
    write_case(data / "flat", suffix=".nii")
    flat = data / "flat" / "dwi.nii"
    flat.write_bytes(flat.read_bytes()[:76] + bytes(32) + flat.read_bytes()[108:])  # no voxel size
    (data / "empty").mkdir()
    adc = data / "good" / "adc.nii.gz"
    adc.symlink_to(adc.rename(tmp_path / "elsewhere.nii.gz"))
    before = tree(tmp_path)
    command = ["batch", str(data), str(out), "--weights", str(tmp_path / "real"), "--device", "cpu", "--dry-run"]
    assert main([*command, "--json"]) == 3
    said, noted = capsys.readouterr()
    told = json.loads(said)
    assert "links to files outside" in noted
    assert told["total"] | {"seconds": 0, "memory_mb": 0} == {
        "cases": 3, "refused": 2, "earlier_results": 0, "seconds": 0, "memory_mb": 0
    }  # fmt: skip
    cases = {case["case"]: case for case in told["cases"]}
    assert "voxel size" in cases["flat"]["message"]
    assert "an empty folder" in cases["empty"]["message"]
    assert cases["good"]["voxels"] == phantom_arrays()[Modality.DWI].size
    assert cases["good"]["seconds"] > 0
    assert 1000 < cases["good"]["memory_mb"] == told["total"]["memory_mb"] < 2000
    assert main(command) == 3
    said = capsys.readouterr().out
    assert "3 cases, 2 refused" in said
    assert "flat: would be refused" in said
    assert tree(tmp_path) == before
    assert main([word for word in command if word != "--dry-run"] + ["--json"]) == 2


def test_earlier_results_correct_the_seconds(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in "ab":
        write_case(data / name)
    assert run_batch(data, out, weights) == 0
    for name, field, value in (("a", "seconds", {"prepare": 30.0, "load members": 99.0}), ("b", "device", "Some GPU")):
        path = out / f"sub-{name}" / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    config: Any = type("Config", (), {"tta": "none"})
    extras: Any = type("Extras", (), {"findings": False})

    size = json.loads((out / "sub-a" / "report.json").read_text())["case"]["grid"]["size_xyz"]
    model = CostModel.of((), config, extras, "cpu", out)
    assert model.factor is not None
    assert model.factor * model.cpu_seconds(size, (4.0, 4.0, 5.0)) == pytest.approx(30.0), "of this device's alone"
    assert CostModel.of((), config, extras, "cpu", tmp_path).factor is not None
