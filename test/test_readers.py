"""Files that are whole are read as they are; damaged ones are refused, never half read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import GRID, phantom_arrays, write_image
from ensemble.errors import InputRefused
from ensemble.readers.imagefile import read_image, stem
from ensemble.types import Modality

DWI = phantom_arrays()[Modality.DWI]
SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_voxels(tmp_path: Path, suffix: str) -> None:
    image = read_image(write_image(DWI, tmp_path / f"dwi{suffix}"), Modality.DWI)
    assert np.array_equal(image.volume.array, DWI)
    assert GRID.distance_voxels(image.volume.grid) < 1e-4
    assert image.volume.array.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float64])
def test_every_pixel_type_is_read_as_float32(tmp_path: Path, dtype: type) -> None:
    array = (DWI / 4).astype(dtype)
    image = read_image(write_image(array, tmp_path / "dwi.mha"), Modality.DWI)
    assert image.volume.array.dtype == np.float32
    assert np.array_equal(image.volume.array, array.astype(np.float32))


def test_a_4d_file_with_one_volume_is_that_volume(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(DWI[None], isVector=False), str(tmp_path / "dwi.nii.gz"))
    assert np.array_equal(read_image(tmp_path / "dwi.nii.gz", Modality.DWI).volume.array, DWI)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".mhd"])
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_files_are_refused(
    tmp_path: Path, suffix: str, kept: float, compressed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"dwi{suffix}"
    image = sitk.ReadImage(str(write_image(DWI, tmp_path / "whole.mha")))
    sitk.WriteImage(image, str(path), useCompression=compressed)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputRefused, match="DWI") as refusal:
        read_image(path, Modality.DWI)
    assert str(path) in str(refusal.value)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def spoil(path: Path, how: Callable[[Path], object]) -> Path:
    how(path)
    return path


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("missing.mha", lambda p: None, "does not exist"),
        ("folder.mha", lambda p: p.mkdir(), "does not exist"),
        ("empty.mha", lambda p: p.write_bytes(b""), "empty file"),
        ("text.mha", lambda p: p.write_text("hello"), "not a readable image"),
        ("text.nii.gz", lambda p: p.write_text("hello"), "damaged or truncated"),
        ("text.nii", lambda p: p.write_text("hello" * 99), "not a readable image"),
        ("slice.mha", lambda p: sitk.WriteImage(sitk.GetImageFromArray(DWI[3]), str(p)), "not 3-D"),
        ("thin.mha", lambda p: sitk.WriteImage(sitk.GetImageFromArray(DWI[3:4]), str(p)), "single slice"),
        (
            "4d.nii.gz",
            lambda p: sitk.WriteImage(sitk.GetImageFromArray(np.stack([DWI, DWI]), isVector=False), str(p)),
            "not 3-D",
        ),
        (
            "rgb.mha",
            lambda p: sitk.WriteImage(sitk.GetImageFromArray(np.stack([DWI] * 3, -1), isVector=True), str(p)),
            "not scalar",
        ),
        (
            "complex.mha",
            lambda p: sitk.WriteImage(sitk.GetImageFromArray(DWI.astype(np.complex64)), str(p)),
            "not scalar",
        ),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, how: Callable[[Path], object], message: str) -> None:
    with pytest.raises(InputRefused, match=message) as refusal:
        read_image(spoil(tmp_path / name, how), Modality.ADC)
    assert name in str(refusal.value)
    assert "ADC" in str(refusal.value)
    assert refusal.value.do


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nii.gz", "a"), ("a.b.mha", "a.b"), ("A.NII.GZ", "A"), ("plain", "plain"), ("x.tif", "x")],
)
def test_stem(name: str, expected: str) -> None:
    assert stem(Path(name)) == expected
