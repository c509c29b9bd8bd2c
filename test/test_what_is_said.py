"""What a refusal says: what is odd and what to do, what was noted before, rights only for want of rights, and memory that ran out."""

from __future__ import annotations

import errno
import gzip
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from batch_runs import run_batch, write_weights
from conftest import (
    GRID,
    StubMember,
    phantom_arrays,
    phantom_case,
    write_contract_case,
    write_final_error_line,
    write_image,
)
from dicom_files import write_series
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, OutOfMemory, UserError, WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.files import error_in_words, parse_json, unreadable_reason
from ensemble.logging_setup import redirect_native_stderr
from ensemble.memory import as_user_error, is_out_of_memory
from ensemble.pipeline import Ensemble
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.serve.worker import CaseFailed
from ensemble.types import Modality
from ensemble.volume import Volume
from ensemble.weights.checkpoints import read_checkpoint

ARRAYS = phantom_arrays()
DWI = ARRAYS[Modality.DWI]


def content_of(name: str, folder: Path) -> bytes:
    """The phantom as a file of some kind."""
    return write_image(DWI, folder / name).read_bytes()


OTHER: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "MetaImage called NIfTI": ("a.nii", lambda f: content_of("x.mha", f), "MetaImage"),
    "NRRD called MetaImage": ("a.mha", lambda f: content_of("x.nrrd", f), "NRRD"),
    "MetaImage called NRRD": ("a.nrrd", lambda f: content_of("x.mha", f), "MetaImage"),
    "MetaImage, compressed, called NIfTI": ("a.nii.gz", lambda f: gzip.compress(content_of("x.mha", f)), "MetaImage"),
    "MetaImage, compressed": ("a.mha", lambda f: gzip.compress(content_of("x.mha", f)), "compressed"),
    "DICOM called NIfTI": ("a.nii.gz", lambda f: write_series(Volume(DWI, GRID), f / "s")[0].read_bytes(), "DICOM"),
    "a zip called NIfTI": ("a.nii.gz", lambda f: b"PK\3\4" + bytes(500), "zip"),
    "a web page about it": ("a.nii.gz", lambda f: b"<!DOCTYPE html><html>Sign in" + bytes(500), "web page"),
    "a pointer of Git LFS": ("a.nii.gz", lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:4\n", "Git LFS"),
    "a pointer of git-annex": ("a.nii.gz", lambda f: b"/annex/objects/MD5E-s123--abc.nii.gz\n", "git-annex"),
    "a picture": ("a.mha", lambda f: b"\x89PNG\r\n\x1a\n" + bytes(500), "picture"),
    "its sidecar": ("a.nii", lambda f: b'{"EchoTime": 0.1}', "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    file, make, said = OTHER[name]
    (tmp_path / file).write_bytes(make(tmp_path))
    with pytest.raises(InputRefused) as refusal:
        read_image(tmp_path / file, Modality.DWI)
    assert said in refusal.value.found, str(refusal.value)
    assert "damaged" not in str(refusal.value)
    assert refusal.value.do


def nifti_with(path: Path, field: str, offset: int, *values: float) -> Path:
    content = bytearray(write_image(DWI, path).read_bytes())
    struct.pack_into("<" + field, content, offset, *values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("field", "offset", "values", "said"),
    [
        ("h", 70, (1536,), "datatype 1536"),
        ("4s", 344, (b"ni1\0",), "ANALYZE"),
        ("f", 112, (float("inf"),), "scl_slope"),
        ("3f", 80, (0.0, 4.0, 5.0), "voxel size"),
        ("4f", 280, (-4.0, 3.0, 0.0, 80.0), "orthogonal"),
    ],
)
def test_an_odd_header_of_a_whole_file_is_not_damaged(
    tmp_path: Path, field: str, offset: int, values: tuple[float, ...], said: str
) -> None:
    path = nifti_with(tmp_path / "a.nii", field, offset, *values)
    with pytest.raises(InputRefused, match="header can't be used") as refusal:
        read_image(path, Modality.DWI)
    assert said in refusal.value.found
    assert "damaged" not in str(refusal.value)
    assert "copy" not in refusal.value.do


def sheared(array: np.ndarray, path: Path, skew: float) -> Path:
    """The phantom with axes that are so much off right angles (cosine)."""
    affine = np.array([[-4, -4 * skew, 0, 80], [0, -4, 0, 70], [0, 0, 5, 12], [0, 0, 0, 1]], float)
    if path.name.endswith(".nii"):
        import nibabel as nib

        image = nib.Nifti1Image(array.T, None)
        image.set_sform(affine, 1)
        image.header["pixdim"][1:4] = 4, 4, 5
        image.header["qform_code"] = 0
        nib.save(image, path)
        return path
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((4, 4, 5))
    sitk.WriteImage(image, str(path))
    lines = b"TransformMatrix = 1 0 0 %.6f 1 0 0 0 1" % skew
    path.write_bytes(path.read_bytes().replace(b"TransformMatrix = 1 0 0 0 1 0 0 0 1", lines))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.mha"])
@pytest.mark.parametrize(("skew", "passes"), [(5e-4, True), (1.5e-3, True), (1.9e-3, True), (2.2e-3, False)])
def test_the_limit_of_skew_is_the_same_in_every_kind_of_file(
    tmp_path: Path, name: str, skew: float, passes: bool
) -> None:
    path = sheared(DWI, tmp_path / name, skew)
    if not passes:
        with pytest.raises(InputRefused):
            read_image(path, Modality.DWI)
        return
    grid = read_image(path, Modality.DWI).volume.grid
    axes = np.reshape(grid.direction, (3, 3))
    assert np.abs(axes.T @ axes - np.eye(3)).max() < 1e-6
    assert np.abs(grid.spacing_mm - np.array([4, 4, 5])).max() < 1e-3
    said = np.array([[1, skew, 0], [0, 1, 0], [0, 0, 1]])
    assert np.abs(axes - said).max() < skew


@pytest.mark.parametrize(
    ("number", "rights"),
    [
        (errno.EACCES, True),
        (errno.EPERM, True),
        (errno.ENOENT, False),
        (errno.EIO, False),
        (errno.ESTALE, False),
        (errno.ELOOP, False),
        (errno.ENAMETOOLONG, False),
        (errno.EMFILE, False),
        (errno.ENOTDIR, False),
    ],
)
def test_rights_are_blamed_only_for_rights(tmp_path: Path, number: int, rights: bool) -> None:
    why = unreadable_reason(tmp_path / "x", OSError(number, os.strerror(number), str(tmp_path / "x")))
    words = f"{why.what} {why.found} {why.do}"
    assert ("permission" in words) is rights
    assert ("we run as user" in words) is rights
    assert why.do


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_failing_disk_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path, really = write_image(DWI, tmp_path / "dwi.nii.gz"), Path.open

    def fail(self: Path, *arguments: object, **options: object) -> object:
        if self == path:
            raise OSError(number, os.strerror(number), str(path))
        return really(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputRefused) as refusal:
        read_image(path, Modality.DWI)
    assert "damaged" not in str(refusal.value)
    assert "permission" not in str(refusal.value)


def without_orientation(path: Path) -> Path:
    """Codes 0: wherever the image lies, its header doesn't say."""
    return nifti_with(path, "2h", 252, 0, 0)


def test_what_the_reader_noted_survives_a_later_refusal(tmp_path: Path) -> None:
    """ADC lies elsewhere since its header says nothing: "covers 12 %" alone sends people looking in the wrong place."""
    dwi = write_image(DWI, tmp_path / "dwi.nii")
    adc = without_orientation(write_image(ARRAYS[Modality.ADC], tmp_path / "adc.nii"))
    raw = read_case_files("x", {Modality.DWI: dwi, Modality.ADC: adc})
    with pytest.raises(InputRefused) as refusal:
        prepare_raw(raw)
    assert "NIfTI form codes 0" in str(refusal.value)
    assert str(refusal.value).index("do: ") < str(refusal.value).index("note: ADC: its header has no position")


@pytest.mark.slow
def test_it_survives_in_every_outlet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set" / "case"
    write_image(DWI, folder / "dwi.nii")
    without_orientation(write_image(ARRAYS[Modality.ADC], folder / "adc.nii"))
    assert run_batch(tmp_path / "set", tmp_path / "out", write_weights(tmp_path / "weights")) == 3
    assert "NIfTI form codes 0" in (tmp_path / "out" / "summary.csv").read_text()
    capfd.readouterr()
    given = ["--dwi", str(folder / "dwi.nii"), "--adc", str(folder / "adc.nii"), "--out", str(tmp_path / "run")]
    assert main(["run", *given, "--device", "cpu", "--skull-strip", "never"]) == 3
    assert "NIfTI form codes 0" in write_final_error_line(capfd.readouterr().err)
    refused = InputRefused("x")
    refused.notes = ("DWI: odd", "ADC: odd")
    assert "ADC: odd" in str(CaseFailed.of(refused))


def test_the_choice_of_a_series_survives_its_refusal(tmp_path: Path) -> None:
    files = write_series(Volume(DWI, GRID), tmp_path, description="dwi")
    write_series(Volume(DWI, GRID), tmp_path, description="dwi FA", uid="2")
    files[7].unlink()
    with pytest.raises(InputRefused) as refusal:
        read_image(tmp_path, Modality.DWI)
    assert "lacks slices" in str(refusal.value)
    assert "note: DWI: DICOM series" in str(refusal.value)


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (lambda: parse_json('{"a": 1,\n b}'), "not JSON: .* (line 2, column 2)"),
        (lambda: b"\xff".decode(), "not UTF-8 text"),
        (lambda: Path("/nowhere").read_bytes(), "No such file or directory"),
        (lambda: {}["members"], "no entry 'members'"),
        (lambda: (_ for _ in ()).throw(EOFError), "it ends too early"),
        (lambda: (_ for _ in ()).throw(ValueError), "ValueError"),
    ],
)
def test_exceptions_are_told_in_words(fails: Callable[[], object], words: str) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011 (of several kinds)
        fails()
    assert re.match(words.replace("(", r"\(").replace(")", r"\)"), error_in_words(error.value))


MEMORY = (
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10, 10), np.dtype("f4")),  # type: ignore[attr-defined]
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("Exception thrown: std::bad_alloc"),
    RuntimeError("itk::ERROR: Failed to allocate memory for image."),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("could not create a primitive"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_is_told(error: Exception) -> None:
    assert is_out_of_memory(error)
    as_told = as_user_error(error)
    assert isinstance(as_told, OutOfMemory)
    assert as_told.exit_code == 137
    assert "memory" in as_told.do
    assert not is_out_of_memory(ValueError("out of memory is a phrase"))
    assert as_user_error(refused := InputRefused("x")) is refused


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["numpy.empty", "SimpleITK.ReadImage"])
def test_an_image_that_does_not_fit_into_memory_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    if isinstance(error, OSError | ImportError) or (where == "numpy.empty" and not isinstance(error, MemoryError)):
        return  # what that library does not raise
    path = write_image(DWI, tmp_path / ("a.nii" if where == "numpy.empty" else "a.mha"))

    def fail(*arguments: object, **options: object) -> object:
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(InputRefused, match="not enough memory to read the DWI image") as refusal:
        read_image(path, Modality.DWI)
    assert "damaged" not in str(refusal.value)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_does_not_fit_into_memory_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    if isinstance(error, ImportError):
        return  # what loading weights does not raise
    torch.save({"network_weights": {}}, tmp_path / "a.pth")

    def fail(*arguments: object, **options: object) -> object:
        raise error

    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(WeightsBroken, match="not enough memory") as refusal:
        read_checkpoint(tmp_path / "a.pth")
    assert "damaged" not in str(refusal.value)


@pytest.mark.parametrize(
    "stage", ["ensemble.pipeline.prepare_for_run", "ensemble.pipeline.fuse", "ensemble.pipeline.load_from_config"]
)
def test_running_out_of_memory_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stage: str
) -> None:
    spec = MemberSpec("a", "nnunet", Path("/nowhere"))
    monkeypatch.setattr(
        "ensemble.pipeline.load_from_config",
        lambda config: Ensemble(RunConfig(), InferenceSettings(), (spec,), (StubMember("a"),), 0.0),
    )

    def fail(*arguments: object, **options: object) -> object:
        raise MemoryError

    monkeypatch.setattr(stage, fail)
    root = write_contract_case(tmp_path / "in")
    code = main(["--input", str(root), "--output", str(tmp_path / "out"), "--device", "cpu"])
    captured = capfd.readouterr()
    assert code == 137
    assert "not enough memory" in write_final_error_line(captured.err)
    assert "bug" not in captured.out + captured.err


def test_running_out_of_memory_is_no_bug_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for modality, array in ARRAYS.items():
        write_image(array, tmp_path / "set" / "case" / f"{modality}.nii.gz")

    def fail(*arguments: object, **options: object) -> object:
        raise MemoryError

    monkeypatch.setattr("ensemble.batch.case_loop.prepare_for_run", fail)
    assert run_batch(tmp_path / "set", tmp_path / "out", write_weights(tmp_path / "weights")) == 137
    table = (tmp_path / "out" / "summary.csv").read_text()
    assert "not enough memory" in table
    assert "bug" not in table
    assert "bug" not in str(CaseFailed.of(MemoryError()))
    assert CaseFailed.of(MemoryError()).exit_code == 137


def test_notes_stand_behind_what_to_do() -> None:
    error = UserError("what", where="where", found="found", do="do")
    error.notes = ("one", "two")
    assert str(error).splitlines() == [
        "what",
        "  where: where",
        "  found: found",
        "  do: do",
        "  note: one",
        "  note: two",
    ]


def test_a_sound_case_has_no_word_of_this() -> None:
    assert not [note for note in prepare_raw(phantom_case()).repairs if "memory" in note or "link" in note]


def test_stderr_without_a_folder_for_it_leaks_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> object:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", none)
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(20):
        with redirect_native_stderr(), redirect_native_stderr():
            pass
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    os.write(2, b"")  # and stderr is still there
