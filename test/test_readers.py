"""Files that are whole are read as they are; damaged ones are refused, never half read."""

from __future__ import annotations

import errno
import gzip
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from conftest import GRID, phantom_arrays, write_image
from ensemble.errors import InputRefused
from ensemble.outputs.formats.image import write as write_volume
from ensemble.readers.b_values import select_dwi
from ensemble.readers.geometry_checks import orthonormalize_direction
from ensemble.readers.imagefile import case_name, read_case_files, read_image
from ensemble.readers.names import image_suffix, stem
from ensemble.readers.sources import source_files
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume, to_sitk

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


#: Bytes of gzip's own header; it says when and where the file was made.
GZIP = 10


def compressed(path: Path, array: AnyArray = DWI) -> Path:
    sitk.WriteImage(to_sitk(Volume(array, GRID)), str(path), useCompression=True)
    return path


@pytest.mark.parametrize(
    ("header", "data", "before", "skipped"),
    [
        ("dwi.mha", "dwi.mha", b"LOCAL\n", 0),
        ("dwi.mhd", "dwi.zraw", b"", 0),
        ("dwi.nrrd", "dwi.nrrd", b"\n\n", GZIP),
        ("dwi.nhdr", "dwi.raw.gz", b"", GZIP),
        ("dwi.nii.gz", "dwi.nii.gz", b"", GZIP),
    ],
)
def test_any_flipped_bit_of_compressed_voxels_is_noticed(
    tmp_path: Path, header: str, data: str, before: bytes, skipped: int
) -> None:
    """ITK reads on after zlib's errors, or does not compare its checksum."""
    image = compressed(tmp_path / header)
    whole = (tmp_path / data).read_bytes()
    start = whole.index(before) + len(before) + skipped
    for place in np.linspace(8 * start, 8 * len(whole) - 1, 60).astype(int):
        spoiled = bytearray(whole)
        spoiled[place // 8] ^= 1 << place % 8
        (tmp_path / data).write_bytes(spoiled)
        with pytest.raises(InputRefused, match="damaged or truncated"):
            read_image(image, Modality.DWI)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64]
)
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_whole_compressed_files_are_read(tmp_path: Path, suffix: str, dtype: type) -> None:
    array = (DWI / 4).astype(dtype)
    image = read_image(compressed(tmp_path / f"dwi{suffix}", array), Modality.DWI)
    assert np.array_equal(image.volume.array, array.astype(np.float32))


@pytest.mark.parametrize("wrapped", [zlib.compress, gzip.compress])
@pytest.mark.parametrize("name", ["dwi.mha", "dwi.mhd"])
def test_other_programs_compress_otherwise(tmp_path: Path, wrapped: Callable[[bytes], bytes], name: str) -> None:
    data, local = wrapped(DWI.tobytes()), name == "dwi.mha"
    head = "ObjectType = Image\nNDims = 3\nTransformMatrix: 1 0 0 0 1 0 0 0 1\nDimSize = 40 48 24\nElementSpacing = 4 4 5\n"
    head += "ElementType = MET_FLOAT\nCompressedData = true\n" + f"CompressedDataSize = {len(data)}\n" * local
    head = (head + f"ElementDataFile = {'local' if local else 'dwi.zraw'}\n").replace("\n", "\r\n")
    (tmp_path / "dwi.zraw").write_bytes(data)
    (tmp_path / name).write_bytes(head.encode() + data * local)
    assert np.array_equal(read_image(tmp_path / name, Modality.DWI).volume.array, DWI)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("DimSize", "40 48 23", "bytes of 176640 (uncompressed)"),
        ("DimSize", "40 48 25", "bytes of 192000 (uncompressed)"),
        ("ElementType", "MET_SHORT", "bytes of 92160 (uncompressed)"),
        ("CompressedDataSize", "5000", "of 184320 (uncompressed)"),
        ("CompressedDataSize", "0", "no CompressedDataSize"),
        ("CompressedDataSize", "5000000", "bytes of 5000000 (compressed)"),
        ("CompressedData", "False", "bytes of 184320"),
    ],
)
def test_voxels_that_are_not_what_the_header_says_are_refused(tmp_path: Path, key: str, value: str, found: str) -> None:
    path = compressed(tmp_path / "dwi.mha")
    changed(path, key, value)
    with pytest.raises(InputRefused) as refusal:
        read_image(path, Modality.DWI)
    assert found in refusal.value.found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lost", [1, 5, 5000])
def test_truncated_metaimages_are_called_so(tmp_path: Path, packed: bool, lost: int) -> None:
    path = compressed(tmp_path / "dwi.mha") if packed else write_image(DWI, tmp_path / "dwi.mha")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(InputRefused, match="damaged or truncated") as refusal:
        read_image(path, Modality.DWI)
    assert "bytes of" in refusal.value.found


METAIMAGE = "ObjectType = Image\nNDims = 3\nDimSize = 40 48 24\nElementSpacing = 4 4 5\nElementType = MET_FLOAT\nElementDataFile = "
NRRD = "NRRD0004\ntype: float\ndimension: 3\nsizes: 40 48 24\nendian: little\nencoding: raw\nspacings: 4 4 5\n"
SLICES = "".join(f"s{z:02d}.raw\n" for z in range(24))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("dwi.mhd", METAIMAGE + "LIST\n" + SLICES),
        ("dwi.mhd", METAIMAGE + "s%02d.raw 0 23 1\n"),
        ("dwi.mha", METAIMAGE + "all.raw\n"),
        ("dwi.mha", METAIMAGE + "LIST\n" + SLICES),
        ("dwi.nhdr", NRRD + "data file: LIST\n" + SLICES),
        ("dwi.nhdr", NRRD + "DataFile: s%02d.raw 0 23 1\n\n"),
        ("dwi.nrrd", NRRD + "data file: all.raw\n\n"),
    ],
)
def test_voxels_in_files_that_would_not_be_looked_after_are_refused(tmp_path: Path, name: str, header: str) -> None:
    """ITK reads them all; digests and stamps would miss a change."""
    (tmp_path / "all.raw").write_bytes(DWI.tobytes())
    for z, plane in enumerate(DWI):
        (tmp_path / f"s{z:02d}.raw").write_bytes(plane.tobytes())
    (tmp_path / name).write_text(header)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))), DWI)
    with pytest.raises(InputRefused, match="are in other files") as refusal:
        read_image(tmp_path / name, Modality.DWI)
    assert "single" in refusal.value.do


@pytest.mark.parametrize(
    ("name", "header", "data"),
    [
        ("dwi.mhd", METAIMAGE + "all.raw\n", "all.raw"),
        ("dwi.mhd", "  " + METAIMAGE.replace(" = ", ":") + "  sub/all of it.raw  \r\n", "sub/all of it.raw"),
        ("dwi.mhd", "Comment = ElementDataFile = x.raw\n" + METAIMAGE + "all.raw\n", "all.raw"),
        ("dwi.nhdr", NRRD + "data file: all.raw\n\n", "all.raw"),
        ("dwi.nhdr", NRRD + "# LIST\nnote:=data file: LIST\nDatafile: a%20b.raw\n", "a%20b.raw"),
    ],
)
def test_the_data_file_that_is_read_is_looked_after(tmp_path: Path, name: str, header: str, data: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / data).write_bytes(DWI.tobytes())
    (tmp_path / name).write_text(header)
    assert np.array_equal(read_image(tmp_path / name, Modality.DWI).volume.array, DWI)
    assert [file for file, _ in source_files(tmp_path / name)] == [name, data]


def spoil(path: Path, how: Callable[[Path], object]) -> Path:
    how(path)
    return path


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("missing.mha", lambda p: None, "does not exist"),
        ("folder.mha", lambda p: p.mkdir(), "no DICOM images"),
        ("empty.mha", lambda p: p.write_bytes(b""), "empty file"),
        ("text.mha", lambda p: p.write_text("hello"), "not a readable image"),
        ("text.nii.gz", lambda p: p.write_text("hello"), "not a readable image"),
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


@pytest.mark.parametrize("name", ["X.MHA", "X.Nii.Gz", "X.NRRD", "a b 'c' ü $x_{$.mha", os.fsdecode(b"caf\xe9.mha")])
def test_odd_names_are_no_obstacle(tmp_path: Path, name: str) -> None:
    plain = write_image(DWI, tmp_path / f"plain{image_suffix(Path(name))}")
    plain.rename(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name, Modality.DWI).volume.array, DWI)


def nifti_with(field: str, offset: int, *values: float) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        write_image(DWI, path)
        content = bytearray(path.read_bytes())
        struct.pack_into(field, content, offset, *values)
        path.write_bytes(content)

    return write


def metaimage_with(key: str, value: str) -> Callable[[Path], object]:
    return lambda path: changed(write_image(DWI, path), key, value)


def changed(path: Path, key: str, value: str) -> None:
    """Change a line of a MetaImage header."""
    head, data = path.read_bytes().split(b"ElementDataFile", 1)
    lines = [
        f"{key} = {value}".encode() if line.startswith(f"{key} =".encode()) else line for line in head.split(b"\n")
    ]
    path.write_bytes(b"\n".join(lines) + b"ElementDataFile" + data)


@pytest.mark.parametrize(
    ("name", "spoil", "found"),
    [
        ("a.nii", nifti_with("f", 80, 0.0), "voxel size"),
        ("a.nii", nifti_with("f", 80, float("nan")), "voxel size"),
        ("a.nii", nifti_with("f", 84, -4.0), "voxel size"),
        ("a.nii", nifti_with("f", 280, float("nan")), "not a number"),
        ("a.nii", nifti_with("f", 108, float("nan")), "data offset"),
        ("a.nii", nifti_with("f", 108, float("inf")), "data offset"),
        ("a.nii", nifti_with("f", 108, -1e30), "data offset"),
        ("a.nii", nifti_with("h", 42, 0), "dimensions"),
        ("a.nii", nifti_with("h", 42, 20000), "bytes of"),
        ("a.mha", metaimage_with("Offset", "nan nan nan"), "Offset"),
        ("a.mha", metaimage_with("ElementSpacing", "4 -4 5"), "ElementSpacing"),
        ("a.mha", metaimage_with("ElementSpacing", "4 0 5"), "ElementSpacing"),
        ("a.mha", metaimage_with("TransformMatrix", "1 0 0 0.3 1 0 0 0 1"), "voxel to world"),
    ],
)
def test_headers_that_itk_would_mend_by_guessing_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], object], found: str
) -> None:
    spoil(tmp_path / name)
    with pytest.raises(InputRefused) as refusal:
        read_image(tmp_path / name, Modality.DWI)
    assert found in refusal.value.found
    assert capfd.readouterr() == ("", "")


def test_a_kind_of_file_that_is_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="has an unsupported format") as refusal:
        read_image(write_image(DWI, tmp_path / "dwi.vtk"), Modality.DWI)
    assert ".nii.gz" in refusal.value.do
    assert ".vtk" in refusal.value.found


def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, really = write_image(DWI, tmp_path / "dwi.mha"), Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputRefused, match="can't be opened") as refusal:
        read_image(path, Modality.DWI)
    assert "Permission denied" in refusal.value.found


def test_one_file_for_two_modalities_is_refused(tmp_path: Path) -> None:
    path = write_image(DWI, tmp_path / "dwi.mha")
    with pytest.raises(InputRefused, match="two modalities"):
        read_case_files("x", {Modality.DWI: path, Modality.ADC: path})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("study/patient7/dwi.nii.gz", "patient7"),
        ("study/patient7/DWI.nii", "patient7"),
        ("study/sub-1_dwi.nii.gz", "sub-1_dwi"),
        ("study/patient7/series.zip", "series"),
    ],
)
def test_a_case_is_called_by_its_folder_where_its_file_says_only_what_it_shows(path: str, name: str) -> None:
    assert case_name(Path(path)) == name


def test_a_header_without_orientation_is_remarked_upon(tmp_path: Path) -> None:
    path = write_image(DWI, tmp_path / "dwi.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<2h", content, 252, 0, 0)
    path.write_bytes(content)
    image = read_image(path, Modality.DWI)
    assert "has no position and orientation" in image.notes[0]
    assert np.array_equal(image.volume.array, DWI)


LPS = "space: left-posterior-superior\n"


@pytest.mark.parametrize(
    ("name", "header", "found"),
    [
        ("dwi.mha", METAIMAGE.replace("ElementSpacing = 4 4 5\n", "") + "LOCAL\n", "no ElementSpacing"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5\n", "\n"), "no spacings"),
        ("dwi.nrrd", NRRD.replace("4 4 5", "nan nan nan\n"), "spacings: nan nan nan"),
        ("dwi.nrrd", NRRD.replace("4 4 5", "4 4 NaN\n"), "spacings: 4 4 NaN"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", LPS + "space directions: (4,0,0) (0,4,0) none\n"), "none"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", LPS + "space directions: none (0,4,0) (0,0,5)\n"), "none"),
    ],
)
def test_headers_without_a_voxel_size_are_refused(tmp_path: Path, name: str, header: str, found: str) -> None:
    (tmp_path / name).write_bytes(header.encode() + DWI.tobytes())
    assert 1.0 in sitk.ReadImage(str(tmp_path / name)).GetSpacing()
    with pytest.raises(InputRefused, match="no valid voxel size") as refusal:
        read_image(tmp_path / name, Modality.DWI)
    assert found in refusal.value.found


DIRECTIONS = "space directions: (4,0,0) (0,4,0) (0,0,5)"


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("dwi.mha", METAIMAGE + "LOCAL\n", "has no orientation"),
        ("dwi.nrrd", NRRD + "\n", "has no orientation"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", f"space dimension: 3\n{DIRECTIONS}\n"), "no orientation"),
        ("dwi.mha", METAIMAGE.replace("Spacing", "Size") + "LOCAL\n", "has no orientation"),
        ("dwi.mha", METAIMAGE.replace("DimSize", "Rotation = 1 0 0 0 1 0 0 0 1\nDimSize") + "LOCAL\n", ""),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", LPS + DIRECTIONS + "\n"), ""),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", f"space: RAS\n{DIRECTIONS}\n"), ""),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", f"space: scanner-xyz\n{DIRECTIONS}\n"), "no orientation"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", f"space: 3D-left-handed\n{DIRECTIONS}\n"), "no orientation"),
        ("dwi.nrrd", NRRD.replace("spacings: 4 4 5", LPS + "space directions: ( 4 , 0, 0 ) (0,4,0)  (0,0,5)\n"), ""),
    ],
)
def test_a_text_header_without_orientation_is_remarked_upon(tmp_path: Path, name: str, header: str, said: str) -> None:
    (tmp_path / name).write_bytes(header.encode() + DWI.tobytes())
    image = read_image(tmp_path / name, Modality.DWI)
    assert np.array_equal(image.volume.array, DWI)
    assert image.volume.grid.spacing_mm == (4.0, 4.0, 5.0)
    assert [said in note for note in image.notes] == [True] * bool(said)


TWICE = "Offset = 1 2 3\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nBinaryDataByteOrderMSB = False\n"


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ("Position = 1.0 2 3\nOrigin = 1 2 3\nRotation = 1 0 0 0 1.0 0 0 0 1\nElementByteOrderMSB = false\n", False),
        ("Position = 1 2 30\n", True),
        ("Origin = 0 0 0\n", True),
        ("Orientation = -1 0 0 0 -1 0 0 0 1\n", True),
        ("ElementByteOrderMSB = True\n", True),
    ],
)
def test_a_metaimage_that_says_a_thing_twice_must_say_the_same(tmp_path: Path, more: str, refused: bool) -> None:
    """ITK takes one of the two, which one depends on their order: the mask lay elsewhere than in other programs."""
    path = tmp_path / "dwi.mha"
    path.write_bytes((METAIMAGE.replace("DimSize", TWICE + more + "DimSize") + "LOCAL\n").encode() + DWI.tobytes())
    if refused:
        with pytest.raises(InputRefused, match="header can.t be used") as refusal:
            read_image(path, Modality.DWI)
        assert "but" in refusal.value.found
    else:
        assert read_image(path, Modality.DWI).volume.grid.origin_mm == (1, 2, 3)


@pytest.mark.parametrize(
    "size",
    [
        "spacings: 4 4 5 nan",
        "space dimension: 4\nspace directions: (4,0,0,0) (0,4,0,0) (0,0,5,0) (0,0,0,1)\nkinds: domain domain domain domain",
    ],
)
def test_the_axis_of_several_volumes_needs_no_size(tmp_path: Path, size: str) -> None:
    header = NRRD.replace("spacings: 4 4 5", size + "\n").replace(
        "dimension: 3\nsizes: 40 48 24", "dimension: 4\nsizes: 40 48 24 2"
    )
    (tmp_path / "dwi.nrrd").write_bytes(header.encode() + (DWI * 2).tobytes() + DWI.tobytes())
    assert np.array_equal(read_image(tmp_path / "dwi.nrrd", Modality.DWI).volume.array, DWI)


@pytest.mark.parametrize("spaced", ["none (4,0,0) (0,4,0) (0,0,5)", "(4,0,0) (0,4,0) (0,0,5) none"])
def test_components_of_voxels_need_no_size(tmp_path: Path, spaced: str) -> None:
    """What is wrong with such an image is that it is not scalar."""
    sizes, kinds = "2 40 48 24", "vector domain domain domain"
    if spaced.endswith("none"):
        sizes, kinds = "40 48 24 2", "domain domain domain list"
    header = NRRD.replace("spacings: 4 4 5", f"kinds: {kinds}\n{LPS}space directions: {spaced}\n")
    header = header.replace("dimension: 3\nsizes: 40 48 24", f"dimension: 4\nsizes: {sizes}")
    (tmp_path / "dwi.nrrd").write_bytes(header.encode() + DWI.tobytes() * 2)
    with pytest.raises(InputRefused, match="not scalar"):
        read_image(tmp_path / "dwi.nrrd", Modality.DWI)


@pytest.mark.parametrize(
    ("offset", "layout", "numbers", "found"),
    [(280, "2f", (4.0, 1.5), "sheared"), (292, "f", (0.0,), "sform and qform"), (80, "f", (4.2,), "by pixdim")],
)
def test_nifti_headers_that_name_two_places_are_refused(
    tmp_path: Path, offset: int, layout: str, numbers: tuple[float, ...], found: str
) -> None:
    with pytest.raises(InputRefused) as refusal:
        read_image(spoil(tmp_path / "a.nii", nifti_with(layout, offset, *numbers)), Modality.DWI)
    assert found in refusal.value.found


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("at", "number", "found"), [(0, np.nan, "not a number"), (5, np.inf, "not a number"), (1, 1.2, "no rotation")]
)
def test_a_qform_alone_that_is_none_is_refused(tmp_path: Path, kind: type, at: int, number: float, found: str) -> None:
    """ITK puts 0 in the place of what is no number."""
    image = kind(DWI.transpose(2, 1, 0), None)
    image.set_qform(np.diag([4.0, 4.0, 5.0, 1.0]), 1)
    nib.save(image, path := tmp_path / "dwi.nii")
    content = bytearray(path.read_bytes())
    assert read_image(path, Modality.DWI).volume.grid.spacing_mm == (4.0, 4.0, 5.0)
    layout, first, size = ("<f", 256, 4) if kind is nib.Nifti1Image else ("<d", 352, 8)
    struct.pack_into(layout, content, first + at * size, number)
    path.write_bytes(content)
    with pytest.raises(InputRefused, match="header can.t be used") as refusal:
        read_image(path, Modality.DWI)
    assert found in refusal.value.found


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_where_the_voxel_size_is_rounded_the_sform_counts(tmp_path: Path, kind: type) -> None:
    """As in other programs: by the voxel size of the header the far end of the mask lay a millimetre off."""
    affine = np.diag([4.03, 4.0, 5.04, 1.0])
    nib.save(kind(DWI.transpose(2, 1, 0), affine), path := tmp_path / "dwi.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into(*(("<3f", content, 80) if kind is nib.Nifti1Image else ("<3d", content, 112)), 4.0, 4.0, 5.0)
    path.write_bytes(content)
    assert np.allclose(read_image(path, Modality.DWI).volume.affine, affine, atol=1e-5)


def test_b_values_choose_the_volume(tmp_path: Path) -> None:
    path = tmp_path / "dwi.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([DWI * 3, DWI, DWI * 2]), isVector=False), str(path))
    (tmp_path / "dwi.bval").write_text("0 1005 500\n")
    image = read_image(path, Modality.DWI)
    assert np.array_equal(image.volume.array, DWI)
    assert "volume 2 of 3, b = 1005" in image.notes[0]


@pytest.mark.parametrize("scales", [(1, 3, 2), (1, 2)], ids=["three volumes", "pair the other way round"])
def test_the_file_of_b_values_that_is_asked_for_is_the_one_that_is_read(tmp_path: Path, scales: Sequence[int]) -> None:
    path = tmp_path / "sub.1_dwi.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([DWI * scale for scale in scales]), isVector=False), str(path))
    with pytest.raises(InputRefused) as refusal:
        read_image(path, Modality.DWI)
    (asked,) = re.findall(r"lay (\S+) beside", refusal.value.do)
    (tmp_path / asked).write_text("1000 " + "0 " * (len(scales) - 1))
    assert "b = 1000" in read_image(path, Modality.DWI).notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_one_direction_is_none_in_their_mean(value: float) -> None:
    directions = np.stack([DWI * 3, DWI / 2, DWI, DWI * 2])
    directions[2, 12, 24, 20] = value
    mean, _ = select_dwi(directions, [0, 1000, 1000, 1000], Path("dwi.nii"))
    assert np.argwhere(~np.isfinite(mean)).tolist() == [[12, 24, 20]]
    assert np.allclose(np.nan_to_num(mean[DWI > 0]), np.where(np.isnan(mean), 0, DWI)[DWI > 0], rtol=1e-5)
    assert not mean[DWI == 0].any()


def oblique(seed: int, digits: int, mirror: bool = False) -> tuple[float, ...]:
    """The direction of a random oblique scan, rounded as in a header of few digits."""
    turned = Rotation.from_euler("xyz", np.random.default_rng(seed).uniform(-40, 40, 3), degrees=True).as_matrix()
    turned[:, 2] *= -1 if mirror else 1
    return tuple(np.round(turned, digits).ravel().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("digits", [3, 4, 5])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_directions_of_few_digits_are_read_and_can_be_written(tmp_path: Path, suffix: str, digits: int) -> None:
    """ITK reads them as they are, and refuses to write them to NIfTI, or writes another place."""
    for seed in range(12):
        rounded = replace(GRID, size=(192, 192, 73), direction=oblique(seed, digits, mirror=seed % 2 == 1))
        zeros = np.zeros(rounded.shape_zyx, np.uint8)
        zeros[1, 1, 1] = 1
        volume = read_image(write_image(zeros, tmp_path / f"read{suffix}", rounded), Modality.DWI).volume
        direction = np.reshape(volume.grid.direction, (3, 3))
        assert np.abs(direction.T @ direction - np.eye(3)).max() < 1e-7
        assert np.linalg.det(direction) == pytest.approx(-1 if seed % 2 else 1)
        assert rounded.distance_voxels(volume.grid) < 200 * 10**-digits
        for written in (".nii.gz", ".mha", ".nrrd"):
            write_volume(volume.like(zeros), tmp_path / f"mask{written}")
            there = read_image(tmp_path / f"mask{written}", Modality.DWI).volume.grid
            assert volume.grid.distance_voxels(there) < 0.01


@pytest.mark.parametrize(("digits", "noted"), [(3, True), (5, False)])
def test_what_straight_axes_move_is_noted_where_it_is_more_than_rounding(
    tmp_path: Path, digits: int, noted: bool
) -> None:
    grid = replace(GRID, size=(192, 192, 73), direction=oblique(3, digits))
    image = read_image(write_image(np.ones(grid.shape_zyx, np.uint8), tmp_path / "a.mha", grid), Modality.DWI)
    assert ["made orthogonal" in note for note in image.notes] == [True] * noted


@pytest.mark.parametrize("cast", [np.float64, np.float32])
def test_a_straight_grid_is_left_as_it_is(cast: type) -> None:
    for seed in range(20):
        grid = replace(GRID, direction=tuple(np.asarray(oblique(seed, 20), cast).astype(float).tolist()))
        assert orthonormalize_direction(grid, Path("a.mha"), "DWI", notes := []) is grid
        assert notes == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dwi.mha", "NDims = 3", "NDims = -1"),
        ("dwi.mha", "NDims = 3", "NDims = 2147483647"),
        ("dwi.mhd", "NDims = 3", "NDims=3\nNDims = -1"),
        ("dwi.mha", "NDims = 3", ""),
        ("dwi.nrrd", "endian: little", "endian: " + "9" * 5000),
        ("dwi.nhdr", "kinds: domain domain domain", "units: " + "a" * 5000),
        ("dwi.nrrd", "endian: little", "endian: little\nendian: little"),
    ],
)
def test_headers_on_which_itk_would_die_are_refused(tmp_path: Path, name: str, old: str, new: str) -> None:
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(path))
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(InputRefused, match="header can.t be used"):
        read_image(path, Modality.DWI)


@pytest.mark.parametrize("name", ["dwi.mha", "dwi.mhd", "dwi.nrrd", "dwi.nhdr", "dwi.nii", "dwi.nii.gz"])
@pytest.mark.parametrize("kind", [".tif", ".mrc", ".vtk", ".h5"])
def test_other_kinds_of_image_by_a_name_that_is_read_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    other, path = tmp_path / f"other{kind}", tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(other))
    path.write_bytes(other.read_bytes())
    with pytest.raises(InputRefused):
        read_image(path, Modality.DWI)


def test_long_words_that_mean_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "dwi.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(path))
    long = b"# " + b"c" * 2000 + b"\ncontent: " + b"c" * 2000 + b"\nDWMRI_note:=" + b"c" * 2000 + b"\nendian"
    path.write_bytes(path.read_bytes().replace(b"endian", long))
    assert read_image(path, Modality.DWI).volume.array.sum() == 120
