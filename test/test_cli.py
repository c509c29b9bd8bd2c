"""The whole program from outside: exit codes, messages, and an output folder that a failure leaves untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import GRID, REPOSITORY, phantom_arrays, tree, write_contract_case, write_final_error_line, write_image
from ensemble.cli import main
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.folders import exclusive_writer
from ensemble.types import Modality
from ensemble.volume import grid_of
from nnunet_folders import FolderSpec, build_folder

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ISLES_")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small members, the second of which needs FLAIR."""
    root = tmp_path_factory.mktemp("weights")
    build_folder(root / "first", FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0)), seed=1)
    build_folder(
        root / "second",
        FolderSpec(
            patch=(32, 48, 48),
            spacing_mm=(5.0, 4.0, 4.0),
            channels=("DWI", "ADC", "FLAIR"),
            schemes=("ZScoreNormalization",) * 3,
            use_mask=(True,) * 3,
        ),
    )
    manifest = [
        {"name": name, "kind": "nnunet", "folder": f"{name}/nnUNetTrainer__nnUNetPlans__3d_fullres"}
        for name in ("first", "second")
    ]
    (root / "manifest.json").write_text(json.dumps({"members": manifest}))
    return root


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "process.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT | environment, cwd="/")


def contract(root: Path, out: Path, weights: Path, *more: str) -> int:
    return main(
        [
            "--input",
            str(root),
            "--output",
            str(out),
            "--weights",
            str(weights),
            "--device",
            "cpu",
            "--tta",
            "none",
            *more,
        ]
    )


@pytest.mark.slow
def test_the_contract_needs_no_arguments_and_leaves_stderr_alone(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in", flair=True)
    done = process(
        ISLES_INPUT=str(tmp_path / "in"),
        ISLES_OUTPUT=str(tmp_path / "out"),
        ISLES_WEIGHTS=str(weights),
        ISLES_TTA="none",
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert {name for name in tree(tmp_path / "out") if "." in name} == {
        "results.json",
        "images/stroke-lesion-segmentation/case-1.mha",
    }
    assert "voted: first, second" in done.stdout
    assert len(done.stdout.splitlines()) < 12


@pytest.mark.slow
def test_run_writes_mask_report_and_picture(tmp_path: Path, weights: Path) -> None:
    arrays = phantom_arrays()
    dwi, adc = write_image(arrays[DWI], tmp_path / "my dwi.nii.gz"), write_image(arrays[ADC], tmp_path / "adc.nrrd")
    done = process("run", "--dwi", dwi, "--adc", adc, "--out", tmp_path / "out", "--weights", weights, "--tta", "none")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert set(tree(tmp_path / "out")) == {"mask.nii.gz", "overlay.png", "report.html", "report.json"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [member["status"] for member in report["members"]] == ["voted", "not applicable"]
    assert all(len(digest) == 64 for member in report["members"] for digest in member["weights_sha256"].values())
    assert f"{report['lesion']['volume_ml']:.2f} ml (1 of 2 members voted)" in done.stdout
    assert "FLAIR" in done.stdout
    mask = sitk.ReadImage(str(tmp_path / "out" / "mask.nii.gz"))
    assert GRID.distance_voxels(grid_of(mask)) < 1e-4
    assert np.count_nonzero(sitk.GetArrayFromImage(mask)) * GRID.voxel_ml == pytest.approx(
        report["lesion"]["volume_ml"], abs=1e-3
    )


@pytest.mark.slow
def test_files_and_contract_give_the_same_mask(tmp_path: Path, weights: Path) -> None:
    arrays = phantom_arrays()
    write_contract_case(tmp_path / "in", flair=True)
    assert contract(tmp_path / "in", tmp_path / "c", weights) == 0
    files = [
        item
        for modality, array in (*arrays.items(), (FLAIR, arrays[DWI] * 0.5))
        for item in (f"--{modality}", str(write_image(array, tmp_path / f"{modality}.nii.gz")))
    ]
    common = [
        "--out",
        str(tmp_path / "r"),
        "--weights",
        str(weights),
        "--device",
        "cpu",
        "--tta",
        "none",
        "--format",
        "mha",
    ]
    assert main(["run", *files, *common]) == 0
    masks = [tmp_path / "c" / "images" / "stroke-lesion-segmentation" / "case-1.mha", tmp_path / "r" / "mask.mha"]
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in masks)
    assert first.any()
    assert np.array_equal(first, second)


def dwi_file(root: Path) -> Path:
    return root / "images" / "dwi-brain-mri" / "case-1.mha"


def adc_file(root: Path) -> Path:
    return root / "images" / "adc-brain-mri" / "some-adc.mha"


def voxels(value: float) -> np.ndarray:
    return np.full(GRID.shape_zyx, value, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message", "names"),
    [
        (lambda r: dwi_file(r).unlink(), "there is no DWI image", "dwi-brain-mri"),
        (lambda r: adc_file(r).unlink(), "there is no ADC image", "adc-brain-mri"),
        (lambda r: shutil.copy(dwi_file(r), dwi_file(r).with_name("b.mha")), "more than one DWI", "b.mha"),
        (lambda r: dwi_file(r).write_bytes(dwi_file(r).read_bytes()[:9000]), "DWI image is damaged or truncated", "case-1.mha"),
        (lambda r: adc_file(r).write_text("no image"), "ADC file is not a readable image", "some-adc.mha"),
        (lambda r: adc_file(r).write_bytes(b""), "empty file", "some-adc.mha"),
        (lambda r: sitk.WriteImage(sitk.GetImageFromArray(np.eye(9)), str(dwi_file(r))), "not 3-D", "case-1.mha"),
        (lambda r: write_image(voxels(0), dwi_file(r)), "constant", "case-1.mha"),
        (lambda r: write_image(voxels(np.nan), adc_file(r)), "no finite value", "some-adc.mha"),
        (lambda r: sitk.WriteImage(sitk.GetImageFromArray(phantom_arrays()[ADC]), str(adc_file(r))), "an impossible size", "some-adc.mha"),
        (lambda r: (r / "inputs.json").write_text("{"), "inputs.json is not valid", "inputs.json"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_3(
    tmp_path: Path,
    weights: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
    names: str,
) -> None:
    spoil(write_contract_case(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an earlier case")
    assert contract(tmp_path / "in", tmp_path / "out", weights) == 3
    said, errors = capfd.readouterr()
    assert message in said
    assert names in said
    assert "\n  do: " in said
    assert "Traceback" not in said
    assert write_final_error_line(errors)
    assert tree(tmp_path / "out") == {"results.json": b"of an earlier case"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.nii.gz", "the DWI image does not exist\n"),
        ("d" * 300 + ".nii.gz", "File name too long"),
        ("d" * 300 + ".zip", "File name too long"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["run", "--dwi", str(tmp_path / name), "--adc", "a.mha", "--out", str(tmp_path / "out")]) == 3
    said, errors = capfd.readouterr()
    assert message in said
    assert "Traceback" not in said
    assert write_final_error_line(errors)


FIRST = Path("first/nnUNetTrainer__nnUNetPlans__3d_fullres")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: shutil.rmtree(w), "does not exist"),
        (lambda w: (w / "manifest.json").write_text("{"), "manifest"),
        (lambda w: (w / FIRST / "plans.json").unlink(), "plans.json"),
        (lambda w: (w / FIRST / "fold_0" / "checkpoint_final.pth").unlink(), "checkpoint_final.pth"),
        (lambda w: (w / FIRST / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\x03\x04"), "checkpoint_final.pth"),
    ],
)  # fmt: skip
def test_broken_weights_are_4(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], object], message: str
) -> None:
    spoil(shutil.copytree(weights, tmp_path / "weights"))
    write_contract_case(tmp_path / "in")
    assert contract(tmp_path / "in", tmp_path / "out", tmp_path / "weights") == 4
    said, errors = capfd.readouterr()
    assert message in said
    assert "Traceback" not in said
    assert write_final_error_line(errors)
    assert not (tmp_path / "out").exists()


def test_tampered_weights_are_4(tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["members"][0]["sha256"] = {"fold_0/checkpoint_final.pth": "0" * 64}
    (tmp_path / "weights" / "manifest.json").write_text(json.dumps(manifest))
    for name in ("plans.json", "dataset.json"):
        (tmp_path / "weights" / FIRST / name).rename(tmp_path / "weights" / FIRST / f"{name}.txt")
    write_contract_case(tmp_path / "in")
    assert contract(tmp_path / "in", tmp_path / "out", tmp_path / "weights") == 4
    assert "does not match its recorded SHA-256" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["| true", ">/dev/full", "2>&-"])
def test_streams_that_take_nothing_do_not_spoil_a_case(tmp_path: Path, weights: Path, how: str) -> None:
    arrays = phantom_arrays()
    for modality in (DWI, ADC):
        write_image(arrays[modality], tmp_path / f"José {modality}.mha")
    program = f"{sys.executable} {REPOSITORY / 'process.py'} run --dwi 'José dwi.mha' --adc 'José adc.mha' --out out --tta none"
    script = f"set -o pipefail; {program} --members first --weights {weights} {how}"
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {"mask.nii.gz", "report.json", "overlay.png"} <= set(tree(tmp_path / "out"))


@pytest.mark.slow
def test_a_member_that_raises_is_5_unless_fewer_votes_are_accepted(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_contract_case(tmp_path / "in", flair=True)
    really = NnunetV2Member.predict

    def predict(self: NnunetV2Member, *arguments: object) -> object:
        if self.name == "second":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return really(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(NnunetV2Member, "predict", predict)
    assert contract(tmp_path / "in", tmp_path / "out", weights) == 5
    said = capfd.readouterr().out
    assert "1 of 2 members voted; 2 are required" in said
    assert "illegal memory access" in said
    assert not (tmp_path / "out").exists()
    assert contract(tmp_path / "in", tmp_path / "out", weights, "--min-members", "1", "--report") == 0
    members = json.loads((tmp_path / "out" / "report.json").read_text())["members"]
    assert [(m["name"], m["status"]) for m in members] == [("first", "voted"), ("second", "failed")]
    assert "illegal memory access" in members[1]["reason"]


def test_a_bug_is_1_and_keeps_its_traceback(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_contract_case(tmp_path / "in")
    monkeypatch.setattr("ensemble.pipeline.fuse", lambda *_, **__: 1 / 0)
    assert contract(tmp_path / "in", tmp_path / "out", weights) == 1
    said, errors = capfd.readouterr()
    assert "ZeroDivisionError" in said
    assert write_final_error_line(errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--fusion", "median"], ["run"], ["--members", "nobody"]])
def test_wrong_usage_is_2(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write_contract_case(tmp_path / "in")
    assert contract(tmp_path / "in", tmp_path / "out", weights, *arguments) == 2
    assert write_final_error_line(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_termination_in_mid_case_leaves_nothing(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in", flair=True)
    (tmp_path / "out").mkdir()
    command = [
        sys.executable,
        "-u",
        str(REPOSITORY / "process.py"),
        "--input",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(
        [*command, "--weights", str(weights)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("member first"):
                break
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=30)
    assert running.returncode == 143
    assert tree(tmp_path / "out") == {}


def test_a_second_writer_to_one_output_folder_is_2(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both would end with 0 and leave two masks, which the platform rejects."""
    write_contract_case(tmp_path / "in")
    files = ["--dwi", str(dwi_file(tmp_path / "in")), "--adc", str(adc_file(tmp_path / "in"))]
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    with exclusive_writer(tmp_path / "out"):
        assert contract(tmp_path / "in", tmp_path / "alias", weights) == 2
        assert main(["run", *files, "--out", str(tmp_path / "out"), "--weights", str(weights)]) == 2
        assert tree(tmp_path / "out") == {}
    said, errors = capfd.readouterr()
    assert said.count("another process is writing") == 2
    assert [write_final_error_line(line).count("another process is writing") for line in errors.splitlines()] == [1, 1]
    assert contract(tmp_path / "in", tmp_path / "out", weights) == 0
    assert contract(tmp_path / "in", tmp_path / "out", weights) == 0, "one after the other is no fault"
    assert {name for name in tree(tmp_path / "out") if "." in name} == {
        "results.json",
        "images/stroke-lesion-segmentation/case-1.mha",
    }


def test_a_python_without_the_packages_is_told_where_they_are() -> None:
    for command in ([], ["run", "--dwi", "a", "--adc", "b", "--out", "c"], ["batch", "a", "b"], ["members", "list"]):
        bare = [sys.executable, "-S", str(REPOSITORY / "process.py"), *command]
        done = subprocess.run(bare, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd="/")
        assert done.returncode == 1
        assert "is not installed" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert "is not installed" in done.stdout
        assert "./run.sh" in done.stdout


def test_a_closed_stdout_is_no_bug(weights: Path) -> None:
    command = f'exec "{sys.executable}" "{REPOSITORY / "process.py"}" members list --weights "{weights}" >&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_members_are_listed_and_checked(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["members", "list", "--weights", str(weights)]) == 0
    assert main(["members", "check", "--weights", str(weights), "--members", "second"]) == 0
    said = capsys.readouterr().out
    assert said.count("first") == 1
    assert said.count("second") == 3
    assert "second: ok" in said
    assert "all loaded" in said
