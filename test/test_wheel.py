"""The package: what the wheel holds, and that it segments the sample case where nothing of the repository is in reach."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import ensemble
from conftest import REPOSITORY, SAMPLE
from ensemble.metrics import dice

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
NAME = "sample-stroke-case.mha"


def done(*command: object, cwd: Path) -> str:
    """Run a command outside the repository. Returns what it printed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    before = {path.name for path in REPOSITORY.iterdir()}
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done(*PIP, "wheel", REPOSITORY, *options, "--wheel-dir", folder, cwd=folder)
    assert {path.name for path in REPOSITORY.iterdir()} == before, "a build leaves nothing behind"
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment that sees the packages of this one, and put the sample case beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (ours,) = {Path(module.__file__ or "").parent.parent for module in (np, nib)}
    (packages / "borrowed.pth").write_text(f"{ours}\n")
    python = folder / "venv" / "bin" / "python"
    done(*PIP, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", "--quiet", wheel, cwd=folder)
    for kind in ("dwi", "adc"):
        image = sitk.ReadImage(str(SAMPLE / "input" / "images" / f"{kind}-brain-mri" / NAME))
        sitk.WriteImage(image, str(folder / f"{kind}.nii.gz"))
    return folder


def truth() -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(SAMPLE / "truth" / NAME)))) > 0


@pytest.mark.slow
def test_the_wheel_holds_weights_templates_and_types_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, inside in (("ensemble", "ensemble"), ("model_weights", "ensemble/model_weights")):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(REPOSITORY / folder).as_posix()}" in names
    assert {name.split("/")[0] for name in names} == {"ensemble", f"isles_ensemble-{ensemble.__version__}.dist-info"}


@pytest.mark.slow
def test_the_command_segments_the_sample_case(installed: Path) -> None:
    program = installed / "venv" / "bin" / "isles-ensemble"
    assert done(program, "--version", cwd=installed).strip() == ensemble.__version__
    said = done(program, "run", "--dwi", "dwi.nii.gz", "--adc", "adc.nii.gz", "--out", "out", "--tta", "none",
                "--members", "slice2d", cwd=installed)  # fmt: skip
    assert "slice2d" in said
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(installed / "out" / "mask.nii.gz")))
    assert dice(truth(), mask > 0) > 0.6
    assert (installed / "out" / "report.html").is_file()
    listed = done(program, "members", "list", cwd=installed)
    assert str(installed) in listed or "iso3d" in listed


@pytest.mark.slow
def test_the_example_of_the_guide_runs(installed: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "api.md").read_text(), re.DOTALL)
    code = f"{example}\nimport ensemble as package, torch\nprint(package.__file__)\n"
    (installed / "example.py").write_text(code)
    said = done(installed / "venv" / "bin" / "python", "example.py", cwd=installed)
    assert "ml in" in said
    assert "the same file is given for two modalities" in said
    assert said.splitlines()[-1].startswith(str(installed)), "the installed package ran, not the repository's"
    mask = nib.load(installed / "mask.nii.gz")
    assert dice(truth(), np.asanyarray(mask.dataobj).transpose(2, 1, 0) > 0) > 0.7


def test_versions_agree() -> None:
    assert PROJECT["version"] == ensemble.__version__
    assert re.search(rf"^version: {re.escape(ensemble.__version__)}$", (REPOSITORY / "CITATION.cff").read_text(), re.M)
    assert f"## {ensemble.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_package_needs_what_requirements_txt_pins() -> None:
    pin = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)
    pinned = dict(pin.findall((REPOSITORY / "requirements.txt").read_text()))
    in_tests = dict(pin.findall((REPOSITORY / "requirements-dev.txt").read_text()))
    pinned |= {name: in_tests[name] for name in ("ray", "pyarrow")}  # not in the image
    needed = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    said = dict(re.fullmatch(r"([\w.-]+)[>=]=([\w.]+)(?:,<[\w.]+)?", each).groups() for each in needed)  # type: ignore[union-attr]
    assert said == {name: version for name, version in pinned.items() if name != "torchvision"}
