"""DICOM folders and archives: the right series, all its slices, in order; or a refusal that says what was found."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from conftest import GRID, phantom_arrays
from dicom_files import edited, whole, write_series
from ensemble.errors import InputRefused
from ensemble.readers.imagefile import read_image
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
ARRAYS = phantom_arrays()
WEIGHTED = Volume(ARRAYS[DWI], GRID)
UNWEIGHTED = Volume(ARRAYS[DWI] * 2.5, GRID)


def examination(root: Path) -> Path:
    """What a scanner sends of a stroke examination: b0 and b1000 in one series, trace, ADC, exponential ADC, FLAIR, a report."""
    write_series(UNWEIGHTED, root / "a", description="ep2d_diff_3scan", uid="1", b=0)
    write_series(WEIGHTED, root / "a", description="ep2d_diff_3scan", uid="1", b=1000, first=101)
    write_series(WEIGHTED, root / "b", description="ep2d_diff_3scan_TRACEW", uid="2", b=1000)
    write_series(Volume(ARRAYS[ADC], GRID), root / "c", description="ep2d_diff_3scan_ADC", uid="3")
    write_series(WEIGHTED, root / "d", description="ep2d_diff_3scan_eADC", uid="4")
    write_series(WEIGHTED, root / "e", description="t2_tirm_tra_dark-fluid", uid="5")
    (root / "README.txt").write_text("sent by the PACS")
    (root / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    return root


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


@pytest.fixture(scope="module")
def whole_examination(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examination(tmp_path_factory.mktemp("dicom") / "examination")


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("modality", "array", "series"),
    [(DWI, ARRAYS[DWI], "TRACEW"), (ADC, ARRAYS[ADC], "3scan_ADC"), (FLAIR, ARRAYS[DWI], "tirm")],
)
def test_the_series_of_each_modality_is_found(
    whole_examination: Path, modality: Modality, array: AnyArray, series: str, archive: bool
) -> None:
    image = read_image(zipped(whole_examination) if archive else whole_examination, modality)
    assert np.array_equal(image.volume.array, whole(array))
    assert GRID.distance_voxels(image.volume.grid) < 1e-4
    assert series in image.notes[0]


def test_slices_are_ordered_by_place_not_by_name_or_number(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", description="dwi")
    for number, path in enumerate(files):
        path.rename(path.with_name(f"{(number * 7) % len(files):03d}.dcm"))
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_of_several_b_values_the_one_nearest_1000_is_taken(tmp_path: Path) -> None:
    for n, b in enumerate((0, 500, 1000)):
        write_series(Volume(ARRAYS[DWI] * (3 - n), GRID), tmp_path / "a", description="diff", b=b, first=1 + 100 * n)
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(ARRAYS[DWI]))
    assert "volume 3 of 3, b = 1000" in image.notes[1]


def test_directions_are_averaged_to_the_trace(tmp_path: Path) -> None:
    for n, scale in enumerate((0.5, 1.0, 2.0)):
        write_series(Volume(ARRAYS[DWI] * scale, GRID), tmp_path / "a", description="diff", b=1000, first=1 + 100 * n)
    image = read_image(tmp_path / "a", DWI)
    head = ARRAYS[DWI] > 200
    assert np.allclose(image.volume.array[head], ARRAYS[DWI][head], rtol=0.01)
    assert "geometric mean of 3" in image.notes[1]


@pytest.mark.parametrize(
    "tags", [{"SequenceName": "*ep_b1000t"}, {}], ids=["b-value in the sequence name", "no b-value at all"]
)
def test_a_series_alone_needs_no_b_value(tmp_path: Path, tags: dict[str, str]) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="unnamed", extra=tags)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_rescaled_values_are_read_as_they_are_meant(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="ADC", slope=2)
    assert np.array_equal(read_image(tmp_path / "a", ADC).volume.array, 2 * whole(WEIGHTED.array / 2))


def test_a_single_series_may_be_called_anything_but_another_modality(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="ax head")
    assert np.array_equal(read_image(tmp_path / "a", FLAIR).volume.array, whole(WEIGHTED.array))
    write_series(WEIGHTED, tmp_path / "b", description="ep2d_ADC")
    with pytest.raises(InputRefused, match="no DICOM series looks like DWI") as refusal:
        read_image(tmp_path / "b", DWI)
    assert "ep2d_ADC" in refusal.value.found


@pytest.mark.parametrize("digits", [3, 4, 5])
def test_directions_of_few_digits_are_straightened(tmp_path: Path, digits: int) -> None:
    """Slices lie where a scanner says exactly, on axes that it rounds."""
    turned = Rotation.from_euler("xyz", (11.3, -17.7, 7.1), degrees=True).as_matrix()
    grid = replace(GRID, size=(40, 48, 40), direction=tuple(turned.ravel().tolist()))
    cosines = [f"{cosine:.{digits}f}" for cosine in turned.T[:2].ravel()]
    array = np.resize(ARRAYS[DWI], grid.shape_zyx)
    write_series(Volume(array, grid), tmp_path / "a", description="dwi", extra={"ImageOrientationPatient": cosines})
    image = read_image(tmp_path / "a", DWI)
    direction = np.reshape(image.volume.grid.direction, (3, 3))
    assert np.abs(direction.T @ direction - np.eye(3)).max() < 1e-6
    assert grid.distance_voxels(image.volume.grid) < 50 * 10**-digits
    assert image.volume.grid.spacing_mm == pytest.approx(grid.spacing_mm, rel=10**-digits)


def test_descriptions_without_a_character_set_can_be_printed(tmp_path: Path) -> None:
    for path in write_series(WEIGHTED, tmp_path / "a", description="DWI Sch#del"):
        path.write_bytes(path.read_bytes().replace(b"Sch#del", b"Sch\xe4del"))
    (note,) = read_image(tmp_path / "a", DWI).notes
    assert "DWI Schädel" in note
    with pytest.raises(InputRefused, match="no DICOM series looks like ADC") as refusal:
        read_image(tmp_path / "a", ADC)
    assert "Schädel" in refusal.value.found


def series(**options: object) -> Callable[[Path], list[Path]]:
    return lambda folder: write_series(WEIGHTED, folder, **({"description": "dwi"} | options))  # type: ignore[arg-type]


def cut(path: Path, kept: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])


def copied(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name("copy.dcm")))


def with_value(path: Path, keyword: str, value: object) -> Path:
    """Write one slice again with another value."""
    return edited(path, lambda dataset: setattr(dataset, keyword, value))


@pytest.mark.parametrize(
    ("spoil", "message", "found"),
    [
        (lambda f: f[9].unlink(), "lacks slices", "mm between 23 slices"),
        (lambda f: cut(f[9], 0.5), "damaged", ""),
        (lambda f: cut(f[-1], 0.99), "damaged", ""),
        (lambda f: cut(f[-1], 0.1), "damaged", ""),
        (lambda f: f[9].write_bytes(b""), "damaged", ""),
        (lambda f: f[9].write_text("not DICOM"), "damaged", ""),
        (lambda f: [path.unlink() for path in f[1:]], "single slice", "1 images"),
        (lambda f: [path.unlink() for path in f], "no DICOM images", ""),
        (lambda f: with_value(copied(f[9]), "SOPInstanceUID", "1.9"), "lacks slices", "1 or 2 images per slice position"),
        (lambda f: with_value(f[9], "ImagePositionPatient", [-60, -70, 55]), "l", "mm"),
        (lambda f: with_value(f[9], "ImageOrientationPatient", [0, 1, 0, 0, 0, 1]), "mixes slices of different orientation", "0.98"),
        (lambda f: write_series(replace_size(), f[0].parent, description="dwi", first=90), "mixes slices of different size", "(20, 48)"),
        (lambda f: write_series(WEIGHTED, f[0].parent, description="dwi 2", uid="2"), "several DICOM series could be", "dwi 2"),
        (lambda f: with_value(f[0], "NumberOfFrames", 24), "damaged or truncated", "bytes of pixel data"),
    ],
)  # fmt: skip
def test_what_is_incomplete_or_ambiguous_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[list[Path]], object], message: str, found: str
) -> None:
    spoil(write_series(WEIGHTED, tmp_path / "a", description="dwi"))
    with pytest.raises(InputRefused, match=message) as refusal:
        read_image(tmp_path / "a", DWI)
    assert found in refusal.value.found
    assert refusal.value.where.startswith(str(tmp_path / "a"))
    assert capfd.readouterr() == ("", "")


def replace_size() -> Volume:
    return Volume(ARRAYS[DWI][:, :, :20], replace(GRID, size=(20, 48, 24)))


def test_low_b_values_alone_are_no_dwi(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", description="diff", b=0)
    write_series(WEIGHTED, tmp_path / "a", description="diff", b=200, first=101)
    with pytest.raises(InputRefused, match="no DWI series has a b-value used for stroke") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "0, 200" in refusal.value.found


@pytest.mark.parametrize("spoil", ["cut", "flipped", "text", "missing"])
def test_damaged_archives_are_refused(tmp_path: Path, spoil: str) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="dwi")
    path = zipped(tmp_path / "a")
    content = bytearray(path.read_bytes())
    if spoil == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes({"cut": content[:-2000], "flipped": content, "text": b"PK but no more"}[spoil])
    with pytest.raises(InputRefused, match="archive is damaged|does not exist") as refusal:
        read_image(path, DWI)
    assert refusal.value.where == str(path)


def test_an_archive_writes_nowhere_but_its_own_folder(tmp_path: Path) -> None:
    (inside := write_series(WEIGHTED, tmp_path / "a", description="dwi"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in inside:
            archive.write(path, path.name)
        archive.writestr("../../escaped.dcm", b"x")
    with pytest.raises(InputRefused, match="is damaged"):
        read_image(tmp_path / "x.zip", DWI)
    assert not list(tmp_path.rglob("escaped*"))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="dwi")
    monkeypatch.setattr("ensemble.readers.dicom.files.MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InputRefused, match="too large"):
        read_image(zipped(tmp_path / "a"), DWI)
