"""What image files store is what is seen: nothing that is no number becomes one on the way, whatever the file is called."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from conftest import GRID, StubMember, phantom_arrays, phantom_lesion, write_contract_case, write_image
from ensemble.cli import main
from ensemble.config import ExtraOutputs
from ensemble.contract.execute import segment_and_publish
from ensemble.contract.isles22 import find_inputs
from ensemble.errors import InputRefused
from ensemble.evaluate.scores import read_mask
from ensemble.pipeline import Ensemble
from ensemble.prepare.case import prepare_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.readers.stored import read_stored
from ensemble.types import AnyArray, Modality
from ensemble.volume import grid_of

DWI = phantom_arrays()[Modality.DWI]
PLACE = (12, 24, 20)
SLOPE, INTERCEPT = 112, 116


def image_of(array: AnyArray) -> sitk.Image:
    """An array on the phantom's grid."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(GRID.spacing_mm)
    image.SetOrigin(GRID.origin_mm)
    image.SetDirection(GRID.direction)
    return image


def write_nifti(
    path: Path, array: AnyArray, *, version: int = 1, scale: tuple[float, float] = (1.0, 0.0), packed: bool = False
) -> Path:
    """A NIfTI file of these very numbers, with the phantom's place, in the array's own byte order."""
    write_image(np.zeros(GRID.shape_zyx, np.uint8), path.with_name("place.nii"))
    header = nib.load(path.with_name("place.nii")).header
    order = ">" if array.dtype.byteorder == ">" else "<"
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header).from_header(header).as_byteswapped(order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape[::-1])
    header["magic"] = b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if version == 1 else 544
    header["scl_slope"], header["scl_inter"] = scale
    content = header.binaryblock + bytes(4) + array.tobytes()
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    return path


def with_value(value: float, kind: type = np.float32) -> AnyArray:
    array = DWI.astype(kind)
    array[PLACE] = value
    return array


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen_in_every_kind_of_file(tmp_path: Path, name: str, kind: type, value: float) -> None:
    """ITK puts 0 for it in NIfTI files."""
    array = read_image(write_image(with_value(value, kind), tmp_path / name), Modality.DWI).volume.array
    assert np.argwhere(~np.isfinite(array)).tolist() == [list(PLACE)]


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
def test_nan_in_the_lesion_is_refused_in_every_kind_of_file(
    tmp_path: Path, name: str, stub_ensemble: Callable[..., Ensemble]
) -> None:
    """As NIfTI it gave exit code 0 and a mask without that part of the lesion."""
    root = write_contract_case(tmp_path / "in")
    spoilt = DWI.copy()
    spoilt[phantom_lesion() & (np.arange(spoilt.shape[2]) > 27)] = np.nan
    (root / "images" / "dwi-brain-mri" / "case-1.mha").unlink()
    write_image(spoilt, root / "images" / "dwi-brain-mri" / name)
    found = find_inputs(root)
    with pytest.raises(InputRefused, match="not finite"):
        raw = read_case_files(found.name, found.files)
        segment_and_publish(
            found, raw, tmp_path / "out", stub_ensemble(StubMember("a")), ExtraOutputs(), SilentWatcher()
        )


KINDS = ("u1", "i1", "<i2", ">i2", "<u2", ">u2", "<i4", ">i4", "<u4", "<i8", ">u8", "<f4", ">f4", "<f8", ">f8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.25, -3.5), (-1e-3, 0.0)])
@pytest.mark.parametrize(("version", "name", "packed"), [(1, "a.nii", False), (2, "a.nii.gz", True)])
def test_every_type_order_and_scale_is_read_as_nibabel_reads_it(
    tmp_path: Path, kind: str, scale: tuple[float, float], version: int, name: str, packed: bool
) -> None:
    path = write_nifti(tmp_path / name, (DWI / 7).astype(kind), version=version, scale=scale, packed=packed)
    image = read_image(path, Modality.DWI)
    reference = nib.load(path)
    assert np.array_equal(image.volume.array, reference.get_fdata().T.astype(np.float32))
    to_lps = np.diag([-1, -1, 1, 1])
    assert np.abs(to_lps @ reference.affine - image.volume.grid.affine).max() < 1e-4
    assert not image.notes


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.0, 0.0), (2.5, 0.0), (0.1, -7.0)])
def test_ordinary_files_are_read_as_itk_reads_them_to_the_bit(
    tmp_path: Path, kind: str, scale: tuple[float, float]
) -> None:
    path = write_nifti(tmp_path / "a.nii", (DWI / 3).astype(kind), scale=scale)
    itk = sitk.ReadImage(str(path))
    image = read_image(path, Modality.DWI).volume
    assert np.array_equal(image.array, sitk.GetArrayFromImage(sitk.Cast(itk, sitk.sitkFloat32)))
    assert image.grid == grid_of(itk)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.mhd", "A.NII.GZ"])
def test_nifti_is_read_whatever_its_name_says(tmp_path: Path, version: int, packed: bool, name: str) -> None:
    path = write_nifti(tmp_path / name, with_value(np.nan), version=version, packed=packed)
    image = read_image(path, Modality.DWI)
    assert np.array_equal(image.volume.array, with_value(np.nan), equal_nan=True)
    assert GRID.distance_voxels(image.volume.grid) < 1e-4


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kept", [2, 300, 360, 560, 30_000, -1])
def test_a_truncated_nifti_is_refused_whatever_its_name(tmp_path: Path, version: int, packed: bool, kept: int) -> None:
    path = write_nifti(tmp_path / "a.nii", DWI, version=version, packed=packed)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputRefused, match="DWI"):
        read_image(path, Modality.DWI)


@pytest.mark.parametrize("scale", [(np.inf, 0.0), (-np.inf, 0.0), (2.0, np.nan), (2.0, np.inf), (np.nan, 5.0)])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, scale: tuple[float, float]) -> None:
    """ITK takes 1 and 0 instead."""
    path = write_nifti(tmp_path / "a.nii", DWI.astype(np.int16), scale=scale)
    with pytest.raises(InputRefused, match="header can.t be used") as refusal:
        read_image(path, Modality.DWI)
    assert "scl_slope" in refusal.value.found


@pytest.mark.parametrize("scale", [(0.0, 0.0), (0.0, 5.0), (np.nan, np.nan), (np.nan, 0.0)])
def test_a_scale_that_is_not_set_is_none(tmp_path: Path, scale: tuple[float, float]) -> None:
    stored = DWI.astype(np.int16)
    image = read_image(write_nifti(tmp_path / "a.nii", stored, scale=scale), Modality.DWI)
    assert np.array_equal(image.volume.array, stored.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "scale"),
    [
        (with_value(1e39, np.float64), (1.0, 0.0)),
        (with_value(30_000, np.int16), (1e35, 0.0)),
        (with_value(1e38), (1e3, 0)),
    ],
)
def test_values_beyond_float32_are_said_to_be(tmp_path: Path, array: AnyArray, scale: tuple[float, float]) -> None:
    image = read_image(write_nifti(tmp_path / "a.nii", array, scale=scale), Modality.DWI)
    assert not np.isfinite(image.volume.array[PLACE])
    assert "too large for float32" in image.notes[0]


def spoilt(path: Path, *changes: tuple[str, int, tuple[Any, ...]]) -> Path:
    content = bytearray(path.read_bytes())
    for layout, offset, numbers in changes:
        struct.pack_into(layout, content, offset, *numbers)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ((("<2h", 70, (1536, 128)),), "datatype 1536"),
        ((("<2h", 70, (1, 1)),), "datatype 1"),
        ((("<2h", 70, (99, 32)),), "datatype 99"),
        ((("<h", 70, (64,)),), "32 bits"),
        ((("<2h", 70, (64, 64)),), "bytes of"),
        ((("<4s", 344, (b"ni1\0",)),), ".hdr of a pair"),
        ((("<4s", 344, (b"\0\0\0\0",)),), "ANALYZE"),
        ((("<8h", 40, (7, 32767, 32767, 32767, 32767, 32767, 32767, 32767)),), "bytes of"),
        ((("<2h", 70, (32, 64)),), "complex"),
        ((("<2h", 70, (128, 24)),), "RGB"),
        ((("<8h", 40, (5, 20, 24, 24, 1, 4, 1, 1)), ("<h", 68, (1007,))), "4 components"),
        ((("<8h", 40, (6, 20, 24, 24, 2, 1, 2, 1)),), ""),
    ],
)
def test_headers_of_what_is_no_scalar_image_are_refused(tmp_path: Path, changes: Any, found: str) -> None:
    path = spoilt(write_nifti(tmp_path / "a.nii", DWI), *changes)
    with pytest.raises(InputRefused) as refusal:
        read_image(path, Modality.DWI)
    assert found in refusal.value.found
    with pytest.raises(InputRefused):
        read_mask(path, "true mask")


@pytest.mark.parametrize("line", ["ElementToIntensityFunctionSlope = 2", "ElementToIntensityFunctionOffset = -1024"])
def test_a_metaimage_whose_scale_itk_ignores_is_refused(tmp_path: Path, line: str) -> None:
    content = write_image(DWI, tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"ElementType", line.encode() + b"\nElementType"))
    with pytest.raises(InputRefused, match="header can.t be used") as refusal:
        read_image(tmp_path / "a.mha", Modality.DWI)
    assert "is not supported" in refusal.value.found


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_byte_order_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    content = write_image(DWI, tmp_path / name).read_bytes()
    for honest, lie in ((b"OrderMSB = False", b"OrderMSB = True"), (b"endian: little", b"endian: big")):
        content = content.replace(honest, lie)
    (tmp_path / name).write_bytes(content)
    adc = write_image(phantom_arrays()[Modality.ADC], tmp_path / "adc.mha")
    with pytest.raises(InputRefused):
        prepare_raw(read_case_files("x", {Modality.DWI: tmp_path / name, Modality.ADC: adc}))


MASK = phantom_lesion().astype(np.float32)


@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz", "m.mha", "m.nrrd"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5, -1.0])
def test_a_mask_with_what_is_no_label_is_refused_in_every_kind_of_file(
    tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = MASK.copy()
    odd[0, 0, 0] = value
    good, bad = write_image(MASK, tmp_path / "good.nii.gz"), write_image(odd, tmp_path / name)
    for arguments in ((good, bad), (bad, good)):
        assert main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out" / "m.csv")]) == 3
        assert "is not a binary mask" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "scale", "voxels"),
    [
        (MASK.astype(np.uint8) * 255, (1.0, 0.0), True),
        (MASK.astype(np.int16), (1 / 255, 0.0), True),
        (MASK.astype(np.uint8), (1e-60, 0.0), False),
        (MASK.astype(np.float64) * 1e-300, (1.0, 0.0), True),
        (MASK.astype(np.uint8) + 1, (1.0, -1.0), True),
        (MASK.astype(np.uint8), (1.0, 1.0), None),
        (MASK.astype(np.uint8), (-1.0, 0.0), None),
        (MASK * 0, (1.0, 0.0), False),
        (MASK.astype(np.uint8), (np.inf, 0.0), None),
    ],
)
def test_masks_are_judged_by_their_values(
    tmp_path: Path, array: AnyArray, scale: tuple[float, float], voxels: bool | None
) -> None:
    version = 2 if scale[0] == 1e-60 else 1  # 0 in NIfTI-1, which has float32
    path = write_nifti(tmp_path / "m.nii", array, scale=scale, version=version)
    if voxels is None:
        with pytest.raises(InputRefused):
            read_mask(path, "true mask")
        return
    expected = MASK > 0 if voxels or version == 2 else MASK < 0
    assert np.array_equal(read_mask(path, "true mask").array, expected)


def test_a_volume_of_a_4d_file_lies_where_itk_puts_it(tmp_path: Path) -> None:
    several = sitk.JoinSeries([image_of(DWI * 3), image_of(DWI)])
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        sitk.WriteImage(several, str(tmp_path / name))
        stored = read_stored(tmp_path / name, "DWI")
        assert stored.array.shape == (2, *GRID.shape_zyx)
        assert GRID.distance_voxels(stored.grid) < 1e-4
        assert np.array_equal(read_image(tmp_path / name, Modality.DWI).volume.array, DWI)
