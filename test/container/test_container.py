"""The built images under the platform's restrictions. `./test.sh --container` builds them and runs this.

Masks are compared with those that the same weights give outside the container.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from apptainer_files import definition
from conftest import REPOSITORY, SAMPLE, slowness, tree
from dicom_files import write_series
from ensemble.metrics import dice
from ensemble.volume import from_sitk, grid_of
from tiny_wheels import write_wheel

if not (IMAGE := os.environ.get("CONTAINER_TEST_IMAGE", "")):
    pytest.skip("needs built images and a container engine: ./test.sh --container", allow_module_level=True)

DOCKER = os.environ.get("DOCKER", "docker")
GPU = os.environ.get("CONTAINER_TEST_GPU") == "1"
INVOKE_IMAGE = IMAGE.replace(":", "-invoke:") if ":" in IMAGE else f"{IMAGE}-invoke"
LABEL = "org.grand-challenge.api-method"
OCI = "org.opencontainers.image."
#: Of the image on a CPU base; with the platform's CUDA base it's that base and as much again.
MAX_BYTES = 2.0e9
RESTRICTIONS = [
    *("--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "16g"),
    *("--memory-swap", "16g", "--pids-limit", "256", "--shm-size", "128m", "--read-only"),
    *(["--gpus", "all"] if GPU else []),
    # on a machine that others keep busy, threads that wait for each other take for ever: OMP_NUM_THREADS=1 ./test.sh --container
    *(["-e", "OMP_NUM_THREADS"] if "OMP_NUM_THREADS" in os.environ else []),
    # root on this side lets the image's own user write; anyone else must be able to take the outputs away again
    *([] if os.getuid() == 0 else ["--user", f"{os.getuid()}:{os.getgid()}"]),
]
MASKS = Path("images/stroke-lesion-segmentation")
CASE = next((SAMPLE / "input" / "images" / "dwi-brain-mri").iterdir()).name
PATIENCE_S = 900
REBUILD = os.environ.get("CONTAINER_TEST_REBUILD") == "1"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ISLES_")}


def docker(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [DOCKER, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
    )
    assert not check or done.returncode == 0, f"docker {arguments[0]}: {done.stdout}{done.stderr}"
    return done


def inspect(image: str, what: str) -> Any:
    return json.loads(docker("image", "inspect", "-f", f"{{{{json {what}}}}}", image).stdout)


def fill(root: Path, flair: bool = True, truncate: bool = False) -> None:
    """Put the sample case into an input folder, in the place of what is there."""
    for old in root.iterdir():
        shutil.rmtree(old)
    shutil.copytree(SAMPLE / "input" / "images", root / "images")
    if not flair:
        shutil.rmtree(root / "images" / "flair-brain-mri")
    if truncate:
        adc = root / "images" / "adc-brain-mri" / CASE
        adc.write_bytes(adc.read_bytes()[:-5000])
    os.chmod(root, 0o755)  # noqa: PTH101


class Folders:
    """What is mounted into a container."""

    def __init__(self, root: Path) -> None:
        self.input, self.output, self.scratch = (root / name for name in ("in", "out", "tmp"))
        self.output_volume = str(self.output)
        for folder in (self.input, self.output, self.scratch):
            folder.mkdir()
            folder.chmod(0o777)

    def mounts(self) -> list[str]:
        return ["-v", f"{self.input}:/input:ro", "-v", f"{self.output_volume}:/output", "-v", f"{self.scratch}:/tmp"]

    def empty_output(self) -> None:
        for path in self.output.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.fixture(scope="session")
def one_member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with one of the shipped members, to be mounted at /opt/ml/model."""
    root = tmp_path_factory.mktemp("model")
    shipped = REPOSITORY / "model_weights"
    entry = json.loads((shipped / "manifest.json").read_text())["members"][0]
    shutil.copytree(shipped / entry["folder"], root / entry["folder"])
    (root / "manifest.json").write_text(json.dumps({"members": [entry]}))
    subprocess.run(["chmod", "-R", "a+rX", str(root)], check=True)
    return root


@pytest.fixture(scope="session")
def empty_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the platform mounts when no model was uploaded."""
    folder = tmp_path_factory.mktemp("empty")
    folder.chmod(0o755)
    return folder


class Expected:
    """Masks that the same weights give outside the container, each computed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._masks: dict[tuple[str, ...], Any] = {}

    def __call__(self, *options: str, flair: bool = True) -> Any:
        key = (*options, str(flair))
        if key not in self._masks:
            folder = self._root / str(len(self._masks))
            (folder / "in").mkdir(parents=True)
            fill(folder / "in", flair)
            command = [sys.executable, REPOSITORY / "process.py", "--input", folder / "in", "--output", folder / "out"]
            subprocess.run([*command, *options], check=True, capture_output=True, env=ENVIRONMENT)
            self._masks[key] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "out" / MASKS / CASE)))
        return self._masks[key]


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(tmp_path_factory.mktemp("expected"))


def check_outputs(output: Path, expected: Any) -> None:
    """Exactly the mask and results.json are there, and the mask is the expected one on the DWI's grid."""
    assert {name for name, content in tree(output).items() if content != b"<folder>"} == {
        "results.json",
        str(MASKS / CASE),
    }
    json.loads((output / "results.json").read_text())
    image = sitk.ReadImage(str(output / MASKS / CASE))
    assert grid_of(image) == grid_of(sitk.ReadImage(str(SAMPLE / "input" / "images" / "dwi-brain-mri" / CASE)))
    mask = sitk.GetArrayFromImage(image)
    assert mask.dtype == np.uint8
    assert expected.any()
    # on one kind of processor the masks are the same; a GPU rounds otherwise
    assert dice(expected, mask) > 0.999 if GPU else np.array_equal(expected, mask)


def run_exec(folders: Folders, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = [item for name, value in environment.items() for item in ("-e", f"{name}={value}")]
    return docker("run", "--rm", *RESTRICTIONS, *folders.mounts(), *options, *variables, IMAGE, check=False)


# the images


@pytest.mark.parametrize("image", [IMAGE, INVOKE_IMAGE])
def test_the_platforms_rules_for_images(image: str) -> None:
    assert inspect(image, ".Config.User").split(":")[0] not in ("", "0", "root")
    assert inspect(image, ".Architecture") == "amd64"
    size = inspect(image, ".Size")
    print(f"{image}: {size / 1e9:.3f} GB")
    if "BASE_IMAGE" in os.environ:
        assert size < MAX_BYTES


def test_the_two_images_differ_in_label_command_and_health_check_only() -> None:
    assert inspect(IMAGE, ".RootFS") == inspect(INVOKE_IMAGE, ".RootFS")
    assert inspect(IMAGE, ".Config.Healthcheck") is None
    assert LABEL not in (inspect(IMAGE, ".Config.Labels") or {})
    assert inspect(INVOKE_IMAGE, ".Config.Labels")[LABEL] == "invoke"
    assert inspect(INVOKE_IMAGE, ".Config.Cmd") == ["serve"]
    assert inspect(IMAGE, ".Config.Cmd") is None


def test_the_health_check_fails_where_nothing_answers() -> None:
    program, *arguments = inspect(INVOKE_IMAGE, ".Config.Healthcheck.Test")[1:]
    done = docker("run", "--rm", *RESTRICTIONS, "--entrypoint", program, INVOKE_IMAGE, *arguments, check=False)
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stderr


@pytest.mark.parametrize("image", [IMAGE, INVOKE_IMAGE])
def test_labels_say_what_the_image_is_and_is_made_from(image: str) -> None:
    labels = inspect(image, ".Config.Labels")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert labels[f"{OCI}version"] == project["version"] == image.split(":")[-1]
    assert labels[f"{OCI}licenses"] == project["license"]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert labels[f"{OCI}revision"].removesuffix("-modified") == (revision.stdout.strip() or "unknown")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", labels[f"{OCI}base.digest"])
    if base := os.environ.get("BASE_IMAGE"):
        assert labels[f"{OCI}base.name"] == base.split("@")[0]
        known = [inspect(base, ".Id"), *(name.split("@")[-1] for name in inspect(base, ".RepoDigests"))]
        assert labels[f"{OCI}base.digest"] in known
        under = inspect(base, ".RootFS.Layers")
        assert inspect(image, ".RootFS.Layers")[: len(under)] == under


def test_the_user_is_a_number_and_nothing_gives_it_more_rights() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", inspect(IMAGE, ".Config.User"))
    find = "find / -xdev -perm /6000 -type f; find / -xdev -name 'pip*' -path '*/bin/*' -perm /111"
    find += "; find / -xdev -name 'pip*.whl' -o -xdev -name 'setuptools*.whl'"
    done = docker("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", IMAGE, "-c", find)
    assert done.stdout == ""


def test_there_are_no_installers() -> None:
    """Neither in the environment nor in the base image's Python."""
    code = """
import importlib
for name in ("pip", "setuptools", "pkg_resources", "ensurepip", "wheel"):
    try:
        print(importlib.import_module(name))
    except ModuleNotFoundError:
        pass
"""
    for python in ("python", "/usr/bin/python3"):
        done = docker("run", "--rm", *RESTRICTIONS, "--entrypoint", python, IMAGE, "-c", code)
        assert done.stdout == ""


def test_what_nothing_imports_is_not_there() -> None:
    unused = re.findall(r"^[\w.-]+", (REPOSITORY / "image" / "unused.txt").read_text(), re.MULTILINE)
    code = "import importlib.metadata as m; print(*(d.name.lower().replace('_', '-') for d in m.distributions()))"
    there = docker("run", "--rm", *RESTRICTIONS, "--entrypoint", "python", IMAGE, "-c", code).stdout.split()
    assert {"nnunetv2", "torch", "simpleitk", "numpy", "onnxruntime-gpu"} <= set(there)
    assert not set(unused) & set(there)


# the same layers


def write_clone(root: Path, date: int, tiny: bool) -> Path:
    """What the image is built from, as a clone of any date and umask has it. Tiny: with tiny packages in place of the real ones."""
    root.mkdir()
    shutil.copy(REPOSITORY / ".dockerignore", root)
    for name in ["Dockerfile", *re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)]:
        source = REPOSITORY / name
        if source.is_dir() and not (tiny and name == "wheels"):
            shutil.copytree(source, root / name)
        elif source.is_file():
            shutil.copy(source, root)
    if tiny:
        (root / "requirements.txt").write_text("torch==0.0.1\n")
        write_wheel(root / "wheels", "torch", "0.0.1")
        for lock in ("build", "run"):
            digest = write_wheel(
                root / "wheels", f"tiny_{lock}", "1.0", "WORDS = {'some', 'words', 'in', 'a', 'set'}\n"
            )
            (root / "locks" / f"{lock}.txt").write_text(f"tiny_{lock}==1.0 --hash=sha256:{digest}\n")
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & (0o700 if date % 2 else 0o755))
        os.utime(path, (date, date))
    return root


def built_layers(clone: Path, base: str) -> list[str]:
    """The layers that a clone gives above those of the base image."""
    tag = f"again-{uuid.uuid4().hex[:8]}"
    options = ["--no-cache", "--platform", "linux/amd64", "--build-arg", f"BASE_IMAGE={base}", "--target", "exec"]
    options += ["--network", os.environ["BUILD_NETWORK"]] if "BUILD_NETWORK" in os.environ else []
    options += ["--secret", f"id=ca,src={os.environ['CA_BUNDLE']}"] if "CA_BUNDLE" in os.environ else []
    docker("build", *options, "-t", tag, clone)
    layers = inspect(tag, ".RootFS.Layers")
    docker("rmi", tag)
    return layers[len(inspect(base, ".RootFS.Layers")) :]


def test_two_builds_of_one_commit_give_the_same_layers(tmp_path: Path) -> None:
    """The real recipe on tiny packages; with CONTAINER_TEST_REBUILD=1 the real image, built once more, which takes minutes."""
    base = os.environ.get("BASE_IMAGE") or inspect(IMAGE, ".Config.Labels")[f"{OCI}base.name"]
    again = built_layers(write_clone(tmp_path / "b", 1_600_000_000, tiny=not REBUILD), base)
    if REBUILD:
        once = inspect(IMAGE, ".RootFS.Layers")[len(inspect(base, ".RootFS.Layers")) :]
    else:
        once = built_layers(write_clone(tmp_path / "a", 1_000_000_001, tiny=True), base)
    assert once
    assert once == again


def test_what_requirements_name_can_be_imported() -> None:
    names = "fastapi matplotlib networkx nibabel nnunetv2 numpy.testing onnxruntime pandas safetensors scipy.stats SimpleITK"
    names += " nnunetv2.inference.predict_from_raw_data"
    names += " skimage.measure sklearn.metrics sympy torch tqdm uvicorn highdicom pynetdicom.sop_class"
    code = f"import importlib\nfor name in {names.split()!r}: importlib.import_module(name)"
    script = ["run", "--rm", *RESTRICTIONS, "--tmpfs", "/tmp", "--entrypoint", "python", IMAGE, "-c", code]
    docker(*script)


def test_the_definition_for_apptainer_runs_under_its_conditions(
    folders: Folders, expected: Expected, tmp_path: Path
) -> None:
    """Any user, no HOME, a read-only root, the machine's own /tmp with others' files, and the caller's Python modules."""
    _, sections = definition()
    fill(folders.input)
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "numpy.py").write_text("raise SystemExit('the numpy of somebody else')\n")
    (folders.scratch / "matplotlib").mkdir(mode=0o700)
    subprocess.run(["chmod", "-R", "a+rX", str(theirs)], check=True)
    images = {
        name: next((folders.input / "images" / f"{name}-brain-mri").iterdir()).name for name in ("dwi", "adc", "flair")
    }
    words = [word for name, file in images.items() for word in (f"--{name}", f"/input/images/{name}-brain-mri/{file}")]
    script = f"{sections['environment']}\nunset HOME\n{sections['test']}\n{sections['runscript']}"
    done = docker(
        *("run", "--rm", *RESTRICTIONS, "--user", "4711:4711", *folders.mounts(), "-v", f"{theirs}:/theirs:ro"),
        *("-e", "PYTHONPATH=/theirs", "-w", "/", "--entrypoint", "sh", IMAGE, "-c", script, "runscript"),
        *(
            "run",
            *words,
            "--out",
            "/output",
            "--format",
            "mha",
            "--tta",
            "none",
            "--members",
            "iso3d",
            "--device",
            "cpu",
        ),
    )
    assert "slice2d" in done.stdout, "members list"
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(folders.output / "mask.mha")))
    assert np.array_equal(mask, expected("--tta", "none", "--members", "iso3d"))
    assert (folders.output / "overlay.png").is_file()
    assert "matplotlib" not in done.stderr


def test_the_image_is_a_bids_app(folders: Folders) -> None:
    """Called as such, it reads the dataset; `--dry-run` spares the networks, which other tests run."""
    for modality in ("dwi", "adc"):
        path = folders.input / "sub-01" / "dwi" / f"sub-01_{modality}.mha"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next((SAMPLE / "input" / "images" / f"{modality}-brain-mri").iterdir()), path)
    (folders.input / "dataset_description.json").write_text(json.dumps({"Name": "sample", "BIDSVersion": "1.10.0"}))
    call = ["run", "--rm", *RESTRICTIONS, *folders.mounts(), IMAGE, "/input", "/output", "participant"]
    told = json.loads(docker(*call, "--participant-label", "01", "--device", "cpu", "--dry-run", "--json").stdout)
    assert [(case["case"], case["status"]) for case in told["cases"]] == [("sub-01", "ready")]
    assert docker(*call, "--participant-label", "02", check=False).returncode == 3
    assert f"CONTAINER_TAG={IMAGE}" in inspect(IMAGE, ".Config.Env"), "as dataset_description.json names it"


# one case a run


def test_exec_mode(folders: Folders, expected: Expected, empty_model: Path) -> None:
    fill(folders.input)
    done = run_exec(folders, "-v", f"{empty_model}:/opt/ml/model:ro", ISLES_TTA="none")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    check_outputs(folders.output, expected("--tta", "none"))


def test_exec_mode_with_an_uploaded_model(folders: Folders, expected: Expected, one_member: Path) -> None:
    fill(folders.input)
    done = run_exec(folders, "-v", f"{one_member}:/opt/ml/model:ro", ISLES_TTA="none")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "voted: iso3d\n" in done.stdout
    check_outputs(folders.output, expected("--tta", "none", "--members", "iso3d"))


def test_exec_mode_as_anyone_without_home_on_one_processor(folders: Folders, expected: Expected) -> None:
    fill(folders.input, flair=False)
    folders.scratch.chmod(0o1777)
    narrow = ["--cpus", "1", "--pids-limit", "128", *(["--user", "54321:54321"] if os.getuid() == 0 else [])]
    done = run_exec(folders, *narrow, ISLES_TTA="none", HOME="/nowhere")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    check_outputs(folders.output, expected("--tta", "none", flair=False))


def test_exec_mode_refuses_a_bad_case(folders: Folders) -> None:
    fill(folders.input, truncate=True)
    done = run_exec(folders)
    assert done.returncode == 3
    (write_final_error_line,) = done.stderr.splitlines()  # what the platform shows its user
    assert f"/input/images/adc-brain-mri/{CASE}" in write_final_error_line
    assert f"/input/images/adc-brain-mri/{CASE}" in done.stdout
    assert tree(folders.output) == {}


# a module of the mercure orchestrator


def write_examination(root: Path) -> Path:
    """The sample case's DWI and ADC as a scanner gives them, the instances side by side, and what mercure lays beside them."""
    kinds = {"dwi": ("ORIGINAL\\PRIMARY", 1000.0), "adc": ("DERIVED\\PRIMARY\\DIFFUSION\\ADC", None)}
    for number, (name, (image_type, b)) in enumerate(kinds.items(), start=1):
        (path,) = (SAMPLE / "input" / "images" / f"{name}-brain-mri").iterdir()
        volume = from_sitk(sitk.ReadImage(str(path)))
        write_series(volume, root, description=name, uid=str(number), image_type=image_type, b=b)
    (root / "task.json").write_text('{"id": "0815", "process": {"module_name": "isles"}}')
    return root


def run_mercure(folders: Folders, *options: object) -> subprocess.CompletedProcess[str]:
    """The image as mercure runs it: no arguments, its folders in two variables, and some uid."""
    mounts = ["-v", f"{folders.input}:/tmp/data", "-v", f"{folders.output}:/tmp/output"]
    variables = ["-e", "MERCURE_IN_DIR=/tmp/data", "-e", "MERCURE_OUT_DIR=/tmp/output", "-e", "ISLES_TTA=none"]
    user = ["--user", "43210:43210"] if os.getuid() == 0 else []
    return docker(
        "run", "--rm", *RESTRICTIONS, "--tmpfs", "/tmp", *mounts, *variables, *user, *options, IMAGE, check=False
    )


def test_mercure_gets_objects_alone(folders: Folders, one_member: Path) -> None:
    write_examination(folders.input)
    before = tree(folders.input)
    done = run_mercure(folders, "-v", f"{one_member}:/opt/ml/model:ro")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert set(tree(folders.output)) == {"segmentation.dcm", "measurements.dcm", "picture.dcm"}
    assert tree(folders.input) == before
    outside = folders.scratch / "outside"
    command = [sys.executable, REPOSITORY / "process.py", "study", folders.input, outside, "--weights", one_member]
    subprocess.run([*command, "--tta", "none"], check=True, capture_output=True, env=ENVIRONMENT)
    masks = [pydicom.dcmread(folder / "segmentation.dcm").pixel_array for folder in (folders.output, outside)]
    assert masks[0].any()
    assert dice(masks[0], masks[1]) > 0.999


def test_mercure_gets_nothing_of_a_study_that_is_refused(folders: Folders) -> None:
    write_examination(folders.input)
    sorted(folders.input.glob("1_*.dcm"))[7].unlink()
    done = run_mercure(folders)
    assert done.returncode == 3
    assert "lacks slices" in done.stderr
    assert tree(folders.output) == {}


# the server

CLIENT = """
import json, sys, time, urllib.error, urllib.request
method, path = sys.argv[1:]
started = time.monotonic()
try:
    answer = urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:4743" + path, method=method))
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    sys.exit(f"refused: {error}")
print(json.dumps([answer.status, json.load(answer), time.monotonic() - started]))
"""


class Server:
    """A container in invoke mode. It has no network: calls come from inside."""

    def __init__(self, name: str, folders: Folders) -> None:
        self.name = name
        self.folders = folders

    def ask(self, method: str, path: str) -> tuple[int, dict[str, Any], float]:
        status, body, seconds = json.loads(
            docker("exec", self.name, "python", "-c", CLIENT, method, path, check=True).stdout
        )
        return status, body, seconds

    def invoke(self) -> tuple[int, dict[str, Any]]:
        return self.ask("POST", "/invoke")[:2]

    def await_ready(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            done = docker("exec", self.name, "python", "-c", CLIENT, "GET", "/health", check=False)
            status, _, seconds = json.loads(done.stdout) if done.returncode == 0 else (0, {}, 0.0)
            assert seconds < 10 * slowness()
            if status == 200:
                return
            time.sleep(0.5)
        raise AssertionError(f"never ready: {self.log()}")

    def log(self) -> str:
        done = docker("logs", self.name)
        return done.stdout + done.stderr

    def await_line(self, beginning: str, count: int = 1) -> None:
        until = time.monotonic() + PATIENCE_S
        while sum(line.startswith(beginning) for line in self.log().splitlines()) < count:
            assert time.monotonic() < until, self.log()
            time.sleep(0.1)

    def start_invoke(self) -> subprocess.Popen[str]:
        """Call /invoke and wait until a member is at work."""
        so_far = sum(line.startswith("member ") for line in self.log().splitlines())
        command = [DOCKER, "exec", self.name, "python", "-c", CLIENT, "POST", "/invoke"]
        calling = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.await_line("member ", so_far + 1)
        return calling


@contextmanager
def serving(folders: Folders, *options: object, **environment: str) -> Iterator[Server]:
    variables = [item for name, value in environment.items() for item in ("-e", f"{name}={value}")]
    name = f"serve-{uuid.uuid4().hex[:8]}"
    docker("run", "-d", "--name", name, *RESTRICTIONS, *folders.mounts(), *options, *variables, INVOKE_IMAGE)
    server = Server(name, folders)
    try:
        server.await_ready()
        yield server
    except BaseException:
        print(server.log())
        raise
    finally:
        docker("rm", "-f", name)


def stop(server: Server) -> None:
    """SIGTERM, and SIGKILL after the platform's 5 s, or more on a machine that others keep busy."""
    docker("stop", "--time", math.ceil(5 * slowness()), server.name)


def state(server: Server) -> Mapping[str, Any]:
    return json.loads(docker("inspect", "-f", "{{json .State}}", server.name).stdout)


def test_invoke_mode_one_case_after_the_other(folders: Folders, expected: Expected, empty_model: Path) -> None:
    none = ["--tta", "none"]
    health_check = inspect(INVOKE_IMAGE, ".Config.Healthcheck.Test")
    assert health_check[0] == "CMD"
    with serving(folders, "-v", f"{empty_model}:/opt/ml/model:ro", ISLES_TTA="none") as server:
        docker("exec", server.name, *health_check[1:])
        for flair, truncate in ((True, False), (False, False), (True, True), (True, False)):
            folders.empty_output()
            fill(folders.input, flair, truncate)
            status, body = server.invoke()
            if truncate:
                assert (status, body["exit_code"]) == (422, 3)
                assert tree(folders.output) == {}
            else:
                assert (status, len(body["voted"])) == (201, 3), body
                check_outputs(folders.output, expected(*none, flair=flair))
        stop(server)
        assert (state(server)["ExitCode"], state(server)["OOMKilled"]) == (143, False)
        said = docker("logs", server.name).stderr.splitlines()
        assert said
        assert all(line.startswith("error: ") for line in said)


def test_invoke_mode_with_an_uploaded_model(folders: Folders, expected: Expected, one_member: Path) -> None:
    fill(folders.input)
    with serving(folders, "-v", f"{one_member}:/opt/ml/model:ro", ISLES_TTA="none") as server:
        status, body = server.invoke()
        assert (status, body["voted"]) == (201, ["iso3d"])
        check_outputs(folders.output, expected("--tta", "none", "--members", "iso3d"))


def test_models_that_cannot_be_loaded_end_the_container_with_4(folders: Folders, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "something.pth").write_text("no weights")
    model.chmod(0o755)
    done = docker(
        "run", "--rm", *RESTRICTIONS, *folders.mounts(), "-v", f"{model}:/opt/ml/model:ro", INVOKE_IMAGE, check=False
    )
    assert done.returncode == 4
    assert done.stdout.splitlines()[-1].startswith(
        "ended with exit code 4: the weights folder has no recognised member"
    )
    assert done.stderr.splitlines() == done.stdout.splitlines()[-1:]


def test_faults_in_mid_case_leave_nothing_behind(folders: Folders) -> None:
    """Inputs that vanish, a worker that is killed, and SIGTERM; one server survives all but the last."""
    fill(folders.input)
    with serving(folders, ISLES_MEMBERS="iso3d") as server:
        calling = server.start_invoke()
        shutil.rmtree(folders.input / "images")
        status, body, _ = json.loads(calling.communicate(timeout=PATIENCE_S)[0])
        assert (status, body["exit_code"]) == (422, 3)
        assert "was removed" in body["error"]["what"]
        assert tree(folders.output) == {}

        fill(folders.input)
        calling = server.start_invoke()
        find = (
            "import os\npids = [p for p in os.listdir('/proc') if p.isdigit() and p != '1' and int(p) != os.getpid()]\n"
        )
        find += "rss = lambda p: int(open(f'/proc/{p}/statm').read().split()[1])\nos.kill(int(max(pids, key=rss)), 9)"
        docker("exec", server.name, "python", "-c", find)
        status, body, _ = json.loads(calling.communicate(timeout=PATIENCE_S)[0])
        assert (status, body["error"]["what"]) == (500, "the segmenting process died")
        assert tree(folders.output) == {}

        server.await_ready()
        calling = server.start_invoke()
        stop(server)
        calling.communicate(timeout=PATIENCE_S)
        assert state(server)["ExitCode"] == 143
        assert tree(folders.output) == {}


def test_a_full_output_volume_is_told(folders: Folders) -> None:
    fill(folders.input)
    folders.output_volume = f"small-{uuid.uuid4().hex[:8]}"
    options = ["type=tmpfs", "device=tmpfs", "o=size=8k,mode=1777"]
    docker("volume", "create", *(item for option in options for item in ("--opt", option)), folders.output_volume)
    with serving(folders, ISLES_MEMBERS="iso3d", ISLES_TTA="none", ISLES_SAVE_PROBABILITIES="1") as server:
        status, body = server.invoke()
        assert (status, body["exit_code"]) == (500, 2), body
        assert body["error"]["what"] == "the outputs can't be written"
        assert "ermission" not in body["error"]["found"]
        left = docker("exec", server.name, "python", "-c", "import os; print(os.listdir('/output'))").stdout
        assert left == "[]\n"
        assert server.ask("GET", "/health")[0] == 200
    docker("volume", "rm", folders.output_volume)


# what is uploaded


def export(*images: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "export.sh"), *images]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("USER root", "runs as root"),
        ("USER 0:0", "runs as root"),
        ('LABEL org.grand-challenge.api-method="invoke"', "but its command is ''"),
        ('CMD ["serve"]', "but its command is 'serve'"),
        ('LABEL org.grand-challenge.api-method="job"\nCMD ["serve"]', "is 'job'"),
    ],
)
def test_images_that_the_platform_would_reject_are_not_exported(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\n{lines}\n")
    bad = f"bad-{uuid.uuid4().hex[:8]}:1"
    docker("build", "-t", bad, tmp_path)
    done = export(bad, DIST=str(tmp_path / "dist"))
    docker("rmi", bad)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "dist").exists()


def check_bill_of_materials(path: Path) -> None:
    """It is CycloneDX by its own schema, and names what is in the image: packages of Python and dpkg, and the weights."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text()) is None
    bill = json.loads(path.read_text())
    there = {part["purl"].split("?")[0]: part for part in bill["components"] if "purl" in part}
    locked = re.findall(r"^([\w.-]+)==([\w.]+)", (REPOSITORY / "locks" / "run.txt").read_text(), re.MULTILINE)
    unused = set(re.findall(r"^[\w.-]+", (REPOSITORY / "image" / "unused.txt").read_text(), re.MULTILINE))
    kept = {f"pkg:pypi/{name}@{version}" for name, version in locked if name not in unused}
    # of other systems, and what only builds
    assert kept - set(there) <= {purl for purl in kept if re.search("/(colorama|httpx2-jsfetch|setuptools)@", purl)}
    assert not [purl for purl in there if re.search(r"/(pip|setuptools|python3-pip)@", purl)]
    assert [purl for purl in there if re.match(r"pkg:deb/\w+/libc6@2\.", purl)]
    assert all(part["licenses"] for part in bill["components"])
    manifest = json.loads((REPOSITORY / "model_weights" / "manifest.json").read_text())
    digests = {digest for member in manifest["members"] for digest in member["sha256"].values()}
    weights = [part for part in bill["components"] if part["type"] == "machine-learning-model"]
    assert len(weights) == len(manifest["members"])
    assert {part["hashes"][0]["content"] for part in weights} <= digests
    assert bill["metadata"]["component"]["hashes"][0]["content"] == inspect(INVOKE_IMAGE, ".Id").split(":")[1]


def test_what_is_exported_is_one_image_and_the_weights(tmp_path: Path) -> None:
    done = export(INVOKE_IMAGE, DIST=str(tmp_path), LEVEL="1")
    assert done.returncode == 0, done.stderr
    name, tag = INVOKE_IMAGE.split("/")[-1].split(":")
    beside = {f"{name}_{tag}.cdx.json", f"{name}_{tag}.NOTICE.txt", "SHA256SUMS"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_{tag}.tar.gz", "model.tar.gz"} | beside
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 4
    check_bill_of_materials(tmp_path / f"{name}_{tag}.cdx.json")
    notice = (tmp_path / f"{name}_{tag}.NOTICE.txt").read_text()
    assert "\nnumpy 2" in notice
    assert "McConnell Brain Imaging Centre" in notice  # the template of the findings
    assert "Permission is hereby granted, free of charge" in notice
    with tarfile.open(tmp_path / f"{name}_{tag}.tar.gz") as archive:
        content = archive.extractfile("manifest.json")
        assert content is not None
        assert [image["RepoTags"] for image in json.load(content)] == [[INVOKE_IMAGE]]
    (tmp_path / f"{name}_{tag}.tar.gz").unlink()  # pytest would keep a gigabyte of it
    (tmp_path / "model").mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "model.tar.gz", "-C", tmp_path / "model"], check=True)
    assert tree(tmp_path / "model") == tree(REPOSITORY / "model_weights")
