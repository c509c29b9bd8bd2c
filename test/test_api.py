"""The Python API: what can be read, that images in memory are held to what files are held to, and that importing costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import ensemble
from conftest import GRID, REPOSITORY, StubMember, phantom_arrays, write_image
from ensemble import InputRefused, UsageError, Volume, read_case, segment
from ensemble.api import Options
from ensemble.config import RunConfig
from ensemble.readers.base import RawCase
from ensemble.types import AnyArray, Modality
from ensemble.volume import to_sitk

ARRAYS = phantom_arrays()
DWI, ADC = Volume(ARRAYS[Modality.DWI], GRID), Volume(ARRAYS[Modality.ADC], GRID)


def as_nibabel(volume: Volume) -> nib.Nifti1Image:
    return nib.Nifti1Image(volume.to_numpy(), volume.affine)


def files(folder: Path) -> tuple[Path, Path]:
    return write_image(DWI.array, folder / "dwi.nii.gz"), write_image(ADC.array, folder / "adc.nii.gz")


def test_every_stable_name_is_there_and_the_stub_names_the_same() -> None:
    stub = ast.parse((REPOSITORY / "ensemble" / "__init__.pyi").read_text())
    said = {
        (alias.asname, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert said == set(ensemble._PUBLIC.items())  # type: ignore[attr-defined]
    for name in ensemble.__all__:  # type: ignore[attr-defined]
        assert getattr(ensemble, name) is not None
    assert (REPOSITORY / "ensemble" / "py.typed").is_file()


def test_the_guide_names_every_stable_name() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert not [name for name in ensemble._PUBLIC if f"`{name}" not in page]  # type: ignore[attr-defined]


def test_importing_is_cheap_and_has_no_side_effect() -> None:
    code = (
        "import sys, os, logging, threading\n"
        "before = dict(os.environ)\n"
        "from ensemble import read_case, load_ensemble, segment\n"
        "heavy = {'torch', 'SimpleITK', 'scipy', 'numpy', 'nibabel'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert dict(os.environ) == before and not logging.getLogger().handlers and threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_options_are_those_of_the_command_line() -> None:
    named, told = get_type_hints(RunConfig), get_type_hints(Options)
    assert set(told) == set(named) - {"weights"}
    assert {name for name in told if told[name] != named[name]} == {"members"}  # any sequence
    with pytest.raises(UsageError, match="no option tat"):
        ensemble.load_ensemble(tat="none")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="not a valid value"):
        ensemble.load_ensemble(tta="never")  # type: ignore[arg-type]


def test_volumes_speak_nibabels_order() -> None:
    image = as_nibabel(DWI)
    volume = Volume.from_numpy(image.get_fdata(dtype=np.float32), image.affine)
    assert np.array_equal(volume.array, DWI.array)
    assert volume.grid.distance_voxels(GRID) < 1e-6
    assert np.array_equal(volume.affine, image.affine)
    assert np.shares_memory(volume.to_numpy(), volume.array)


BAD_AFFINES = {
    "not 4x4": np.eye(3),
    "not a number": np.full((4, 4), np.nan),
    "flat": np.diag([1.0, 1.0, 0.0, 1.0]),
    "sheared": np.eye(4) + 0.2 * np.eye(4, k=1),
    "a projection": np.ones((4, 4)),
}


@pytest.mark.parametrize("affine", BAD_AFFINES.values(), ids=BAD_AFFINES)
def test_an_affine_that_names_no_place_is_refused(affine: AnyArray) -> None:
    with pytest.raises(InputRefused, match="affine"):
        Volume.from_numpy(np.ones((3, 4, 5)), affine)


@pytest.mark.parametrize(
    "array", [np.ones((3, 4)), np.ones((2, 3, 4, 5)), np.ones((2, 2, 2), complex), np.array([["a"]])]
)
def test_an_array_that_is_no_image_is_refused(array: AnyArray) -> None:
    with pytest.raises(InputRefused, match="not a 3-D image"):
        Volume.from_numpy(array, np.eye(4))


WAYS: dict[str, Callable[[Volume], object]] = {
    "volume": lambda volume: volume,
    "array": lambda volume: Volume.from_numpy(volume.to_numpy(), volume.affine),
    "SimpleITK": to_sitk,
    "nibabel": as_nibabel,
    "NIfTI-2": lambda volume: nib.Nifti2Image(volume.to_numpy(), volume.affine),
    "MGH": lambda volume: nib.MGHImage(volume.to_numpy(), volume.affine.astype(np.float32)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_case_in_memory_is_the_case_in_files(
    tmp_path: Path, way: Callable[[Volume], object], stub_ensemble: Callable[..., ensemble.Ensemble]
) -> None:
    expected = read_case(*files(tmp_path))
    case = read_case(way(DWI), way(ADC), name="mine")
    assert (expected.name, case.name) == (tmp_path.name, "mine")
    for modality, image in expected.images.items():
        assert np.array_equal(case.images[modality].volume.array, image.volume.array)
        assert case.images[modality].volume.array.dtype == np.float32
        assert case.images[modality].volume.grid.distance_voxels(image.volume.grid) < 1e-4
    one, other = (segment(each, stub_ensemble(StubMember("a"))) for each in (expected, case))
    assert one.mask.array.any()
    assert np.array_equal(one.mask.array, other.mask.array)
    assert one.mask.array.dtype == bool
    assert one.probability.array.dtype == np.float32


def test_files_and_images_in_memory_mix(tmp_path: Path) -> None:
    dwi, adc = files(tmp_path)
    for case in (read_case(str(dwi), ADC), read_case(DWI, adc)):
        assert list(case.images) == [Modality.DWI, Modality.ADC]


def test_scaled_integers_of_nibabel_images_are_read_as_from_the_file(tmp_path: Path) -> None:
    image = nib.Nifti1Image((DWI.to_numpy() * 7).astype(np.int16), DWI.affine)
    image.header.set_slope_inter(0.125, 3)
    nib.save(image, tmp_path / "dwi.nii.gz")
    loaded = nib.load(tmp_path / "dwi.nii.gz")
    from_file, held = (read_case(each, ADC).images[Modality.DWI].volume for each in (tmp_path / "dwi.nii.gz", loaded))
    assert np.array_equal(from_file.array, held.array)
    assert from_file.grid == held.grid


def two_places() -> nib.Nifti1Image:
    image = as_nibabel(DWI)
    image.set_qform(np.diag([4.0, 4.0, 5.0, 1.0]), 1, strip_shears=False)
    return image


def sheared_sitk() -> Volume:
    from dataclasses import replace

    return Volume(DWI.array, replace(GRID, direction=(1.0, 0.3, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "sform and qform apart": (two_places, "sform and qform differ"),
    "sheared": (sheared_sitk, "orthogonal"),
    "four axes": (lambda: nib.Nifti1Image(np.ones((8, 8, 8, 3)), np.eye(4)), "3"),
    "a vector image": (lambda: sitk.Image([4, 4, 4], sitk.sitkVectorFloat32, 3), "one 3-D volume"),
    "a slice": (lambda: Volume.from_numpy(np.ones((4, 4, 1)), np.eye(4)), "single slice"),
    "a voxel of several numbers": (lambda: nib.Nifti1Image(np.ones((4, 4, 4), np.complex64), np.eye(4)), "3-D image"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_is_refused_for_an_image_in_memory_is_refused_for(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputRefused, match=words) as error:
        read_case(ADC, make())
    assert "ADC given as" in str(error.value)


def test_an_array_without_a_place_is_no_image() -> None:
    with pytest.raises(UsageError, match=r"Volume\.from_numpy"):
        read_case(np.ones((4, 4, 4)), ADC)


def test_a_truncated_file_behind_a_nibabel_image_is_refused(tmp_path: Path) -> None:
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    lazy = nib.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputRefused, match="can't be read"):
        read_case(lazy, ADC)


def test_a_case_in_memory_without_adc_says_what_to_do(stub_ensemble: Callable[..., ensemble.Ensemble]) -> None:
    case: RawCase = read_case(DWI)
    with pytest.raises(InputRefused, match="no ADC image"):
        segment(case, stub_ensemble(StubMember("a")))


def test_bad_voxels_in_memory_are_refused_as_in_files(stub_ensemble: Callable[..., ensemble.Ensemble]) -> None:
    constant = DWI.like(np.full_like(DWI.array, 3.0))
    with pytest.raises(InputRefused):
        segment(read_case(constant, ADC), stub_ensemble(StubMember("a")))
