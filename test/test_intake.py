"""Odd and broken inputs, end to end: the right mask (the same voxels in world space), or exit 3, a message, and an untouched folder.

All but the last tests use a member that decides voxel by voxel: what differs, the reading and preparing made different.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import odd_inputs as odd
from conftest import tree, write_final_error_line
from dicom_files import write_series
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.metrics import dice
from ensemble.pipeline import Ensemble
from ensemble.types import AnyArray, Modality
from ensemble.volume import from_sitk
from odd_inputs import (
    ADC,
    DWI,
    FLAIR,
    Case,
    cast,
    cropped,
    flipped,
    outside,
    padded,
    permuted,
    regridded,
    sample,
    turned,
)

Files = dict[Modality, Path]
EXACT, NEARLY, RESAMPLED = 0.999, 0.98, 0.9


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program as it is, but for its networks; no brain here has a skull to strip."""
    member = odd.Rule("rule")
    spec = MemberSpec("rule", "nnunet", Path("/nowhere"))
    monkeypatch.setattr(
        "ensemble.pipeline.load_from_config",
        lambda config: Ensemble(
            RunConfig(skull_strip=config.skull_strip), InferenceSettings(), (spec,), (member,), 0.0
        ),
    )


def segmented(case: Case, folder: Path) -> sitk.Image:
    """The mask that the contract's command writes for a case."""
    root = case.write(folder / "in")
    assert main(["--input", str(root), "--output", str(folder / "out"), "--device", "cpu"]) == 0
    (mask,) = (folder / "out" / "images" / "stroke-lesion-segmentation").iterdir()
    return sitk.ReadImage(str(mask))


@cache
def _expected(folder: Path) -> sitk.Image:
    mask = segmented(sample(), folder)
    assert sitk.GetArrayViewFromImage(mask).sum() > 200
    return mask


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


def agreement(mask: sitk.Image, expected: sitk.Image) -> float:
    """Dice of two masks in world space, on the grid of the expected one."""
    there = sitk.Resample(mask, expected, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return dice(sitk.GetArrayFromImage(expected) > 0, sitk.GetArrayFromImage(there) > 0)


def with_file(beside: str, text: str) -> Callable[[Files], object]:
    return lambda files: files[DWI].with_name(beside).write_text(text)


def as_dicom(
    files: Files, *, archive: bool = False, spoil: Callable[[list[Path]], object] = lambda files: None
) -> None:
    """Put DICOM series in the place of the files."""
    for number, (modality, path) in enumerate(files.items()):
        volume = from_sitk(sitk.ReadImage(str(path)))
        folder = path.with_name("series")
        slices = write_series(volume, folder, description=f"diff {modality}", uid=str(number))
        if modality is DWI:
            spoil(slices)
        path.unlink()
        if archive:
            shutil.make_archive(str(path.with_name("scan")), "zip", folder)
            shutil.rmtree(folder)


def header(offset: int, layout: str, *numbers: float) -> Callable[[Files], object]:
    """Write numbers into the DWI's NIfTI header."""

    def spoil(files: Files) -> None:
        content = bytearray(files[DWI].read_bytes())
        struct.pack_into("<" + layout, content, offset, *numbers)
        files[DWI].write_bytes(content)

    return spoil


def line(key: str, value: str) -> Callable[[Files], object]:
    """Change a line of the DWI's MetaImage header."""

    def spoil(files: Files) -> None:
        head, data = files[DWI].read_bytes().split(b"ElementDataFile", 1)
        rows = [f"{key} = {value}".encode() if row.startswith(key.encode()) else row for row in head.split(b"\n")]
        files[DWI].write_bytes(b"\n".join(rows) + b"ElementDataFile" + data)

    return spoil


def cut(kept: float, modality: Modality = DWI) -> Callable[[Files], object]:
    return lambda files: files[modality].write_bytes(
        files[modality].read_bytes()[: int(files[modality].stat().st_size * kept)]
    )


def case(**fields: object) -> Case:
    return Case(sample().images, **fields)  # type: ignore[arg-type]


def volumes(scales: tuple[float, ...], b_values: str) -> Case:
    """A DWI of several volumes with a file of b-values."""
    return case(suffix=".nii.gz").change(odd.stack(*scales), DWI).then(with_file("scan.bval", b_values))


def shortened(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def archived(files: Files) -> None:
    as_dicom(files, archive=True)


def archived_as_it_is(files: Files) -> None:
    shutil.make_archive(str(files[DWI].with_name("scan")), "zip", files[ADC].parent)
    files[DWI].unlink()


def renamed(name: str) -> Callable[[Files], object]:
    return lambda files: files[DWI].rename(files[DWI].with_name(name))


def brighter_than(fraction: float) -> Callable[[sitk.Image], sitk.Image]:
    """Clipped at a fraction of the brightest value."""
    return odd.values(lambda a: np.minimum(a, fraction * float(a.max())))


def at_places(what: float, where: Callable[[AnyArray], AnyArray]) -> Callable[[sitk.Image], sitk.Image]:
    return odd.values(lambda a: np.where(where(a), np.float32(what), a))


def one_inside(array: AnyArray) -> AnyArray:
    z, y, x = (n // 2 for n in array.shape)
    hit = np.zeros(array.shape, bool)
    hit[z, y + 4, x + 6] = True
    return hit


def swapped() -> Case:
    images = sample().images
    return Case({DWI: images[ADC], ADC: images[DWI]})


def unweighted(image: sitk.Image) -> sitk.Image:
    """The b0 image that belongs to the sample's DWI."""
    adc = sample().images[ADC]
    return image * sitk.Exp(sitk.Clamp(adc, sitk.sitkFloat32, 0.0, 4000.0) * 1e-3)


def exponential(image: sitk.Image) -> sitk.Image:
    return sitk.Exp(image * -1e-3) * sitk.Cast(image > 0, sitk.sitkFloat32)


ORDERS = ((1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0))
FIRST_HALF = lambda a: np.arange(len(a))[:, None, None] < len(a) // 2  # noqa: E731

#: name -> (case, Dice with the plain case's mask, a word that the log must hold)
ACCEPTED: dict[str, tuple[Callable[[], Case], float, str]] = {
    **{f"format {suffix}": (lambda s=suffix: case(suffix=s), EXACT, "") for suffix in (".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr")},
    "format in capitals": (lambda: case().then(renamed("SCAN.MHA")), EXACT, ""),
    "odd file name": (lambda: case(name="a b 'c' ü $x"), EXACT, ""),
    "hidden file beside": (lambda: case().then(with_file("._scan.mha", "x")), EXACT, ""),
    **{f"DWI as {pixel}": (lambda p=pixel: sample().change(cast(p), DWI), EXACT, "") for pixel in odd.PIXELS if pixel != "uint8"},
    "DWI as uint8": (lambda: sample().change(lambda i: cast("uint8")(i / 4), DWI), RESAMPLED, ""),
    "ADC as float64 in mm^2/s": (lambda: sample().change(lambda i: cast("float64")(i) / 1e6, ADC), EXACT, ""),
    "ADC in 1e-3 mm^2/s": (lambda: sample().change(lambda i: i / 1e3, ADC), EXACT, ""),
    "DWI of another gain": (lambda: sample().change(lambda i: i * 0.0123, DWI), EXACT, ""),
    "DWI in 1e5": (lambda: sample().change(lambda i: i * 531.0, DWI), EXACT, ""),
    "background 1e-22": (lambda: sample().change(outside(lambda n: 1e-22 * n)), NEARLY, "set to 0"),
    "background 1e-6": (lambda: sample().change(outside(lambda n: 1e-6 * np.abs(n))), NEARLY, "set to 0"),
    "background of negative ringing": (lambda: sample().change(outside(lambda n: -3 * np.abs(n))), NEARLY, "set to 0"),
    "background of faint noise": (lambda: sample().change(outside(lambda n: 2 * np.abs(n)), DWI), NEARLY, "set to 0"),
    **{f"flipped along {axes}": (lambda a=axes: sample().change(flipped(*a)), EXACT, "") for axes in ((0,), (1,), (2,), (0, 1, 2))},
    **{f"axes {order}": (lambda o=order: sample().change(permuted(*o)), EXACT, "") for order in ORDERS},
    "ADC flipped": (lambda: sample().change(flipped(0, 2), ADC), EXACT, "reordered"),
    "ADC permuted": (lambda: sample().change(permuted(1, 2, 0), ADC), EXACT, "reordered"),
    "DWI flipped": (lambda: sample().change(flipped(1), DWI), EXACT, "reordered"),
    "ADC cropped to the brain": (lambda: sample().change(cropped(1, 1, 1, 1, 1, 1), ADC), EXACT, "reordered"),
    "ADC padded": (lambda: sample().change(padded(7, 3, 2, 0, 9, 4), ADC), EXACT, "reordered"),
    "both padded": (lambda: sample().change(padded(20, 3, 9, 5, 30, 0)), EXACT, ""),
    "DWI padded": (lambda: sample().change(padded(5, 0, 2, 6, 1, 3), DWI), EXACT, "reordered"),
    "ADC header rounded": (lambda: sample().change(turned(0, (1e-3, 0, 0)), ADC), EXACT, ""),
    "ADC header off by 0.02 voxels": (lambda: sample().change(turned(0, (0.04, 0, 0)), ADC), EXACT, "rounding"),
    "ADC half a voxel off": (lambda: sample().change(regridded((2, 2, 2), shift_mm=1.0), ADC), RESAMPLED, "resampled"),
    "ADC on a coarser grid": (lambda: sample().change(regridded((2.5, 2.5, 2.5)), ADC), 0.85, "resampled"),
    "ADC on a finer grid": (lambda: sample().change(regridded((1.25, 1.25, 1.5)), ADC), RESAMPLED, "resampled"),
    "ADC on an oblique grid": (lambda: sample().change(regridded((2, 2, 2), degrees=12), ADC), 0.85, "resampled"),
    "DWI and ADC on an oblique grid": (lambda: sample().change(regridded((2, 2, 2), degrees=17)), 0.8, ""),
    "slices of 6 mm": (lambda: sample().change(regridded((2, 2, 6))), 0.6, ""),
    "slices of 1 mm": (lambda: sample().change(regridded((2, 2, 1))), RESAMPLED, ""),
    "64 x 64 x 12": (lambda: sample().change(padded(0, 0, 0, 54, 31, 0)).change(regridded((4, 4, 12))), 0.5, ""),
    "4-D with one volume": (lambda: case(suffix=".nii.gz").change(odd.stack(1)), EXACT, ""),
    "b0 and b1000, no b-values": (lambda: case(suffix=".nii.gz").change(odd.stack(3, 1), DWI), EXACT, "last of two"),
    "b0 and b1000 with b-values": (lambda: volumes((3, 1), "0 1000\n"), EXACT, "b = 1000"),
    "b1000 first": (lambda: volumes((1, 3), "1000 0"), EXACT, "volume 1 of 2"),
    "three directions": (lambda: volumes((3, 0.8, 1, 1.25), "0 1000 1000 1000"), NEARLY, "geometric mean of 3"),
    "DICOM folders": (lambda: case().then(as_dicom), NEARLY, "DICOM series"),
    "DICOM archives": (lambda: case().then(archived), NEARLY, "DICOM series"),
    "NaN in the air of ADC": (lambda: sample().change(at_places(np.nan, lambda a: a == 0), ADC), NEARLY, "NaN"),
    "infinite values in the air of DWI": (lambda: sample().change(at_places(np.inf, lambda a: a == 0), DWI), NEARLY, "NaN or infinite"),
    "negative ADC in places": (lambda: sample().change(odd.values(lambda a: np.where((a > 0) & (a < 250), -a, a)), ADC), 0.97, ""),
    "ADC clipped at 3": (lambda: sample().change(odd.values(lambda a: np.minimum(a, 3000)), ADC), EXACT, ""),
    "FLAIR on its own grid": (lambda: sample(flair=True), EXACT, "FLAIR"),
    "FLAIR of a patient who moved": (lambda: sample(flair=True).change(turned(4, (5, -3, 2)), FLAIR), EXACT, "FLAIR registered"),
    "FLAIR flipped and permuted": (lambda: sample(flair=True).change(lambda i: permuted(2, 0, 1)(flipped(0, 1)(i)), FLAIR), EXACT, "FLAIR"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_inputs_give_the_right_mask(
    tmp_path: Path, plain: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    build, least, word = ACCEPTED[name]
    expected = _expected(plain)
    capfd.readouterr()
    mask = segmented(build(), tmp_path)
    said, errors = capfd.readouterr()
    assert errors == ""
    assert word in said, said
    assert agreement(mask, expected) >= least
    files = [
        path
        for path in (tmp_path / "in" / "images" / "dwi-brain-mri").iterdir()
        if path.suffix not in (".bval", ".raw", ".zip")
    ]
    if files and files[0].is_file() and files[0].suffix.islower() and not files[0].name.startswith("._"):
        dwi = sitk.ReadImage(str(files[0]))
        dwi = dwi[:, :, :, 0] if dwi.GetDimension() == 4 else dwi
        assert (mask.GetSize(), mask.GetOrigin(), mask.GetSpacing()) == (
            dwi.GetSize(),
            dwi.GetOrigin(),
            dwi.GetSpacing(),
        )
        assert mask.GetDirection() == dwi.GetDirection()


#: name -> (case, what the message must say)
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "no DWI": (lambda: case().then(lambda f: f[DWI].unlink()), "there is no DWI image"),
    "no ADC": (lambda: case().then(lambda f: f[ADC].unlink()), "there is no ADC image"),
    "two DWIs": (lambda: case().then(lambda f: shutil.copy(f[DWI], f[DWI].with_name("b.mha"))), "more than one DWI"),
    "empty file": (lambda: case().then(lambda f: f[ADC].write_bytes(b"")), "empty file"),
    "text": (lambda: case().then(lambda f: f[DWI].write_text("hello")), "not a readable image"),
    "another kind": (lambda: case().then(renamed("scan.vtk")), "there is no DWI image"),
    "broken link": (lambda: case().then(lambda f: (f[DWI].unlink(), f[DWI].symlink_to("nowhere.mha"))), "DWI image"),
    **{f"truncated {suffix} at {kept}": (lambda s=suffix, k=kept: case(suffix=s).then(cut(k)), "DWI")
       for suffix in (".mha", ".nii", ".nii.gz", ".nrrd") for kept in (0.01, 0.6, 0.9999)},
    "truncated ADC": (lambda: case(suffix=".nii").then(cut(0.5, ADC)), "the ADC image is damaged or truncated"),
    "mhd without its data": (lambda: case(suffix=".mhd").then(lambda f: f[DWI].with_suffix(".raw").unlink()), "DWI"),
    "NIfTI voxel size 0": (lambda: case(suffix=".nii").then(header(80, "f", 0.0)), "voxel size"),
    "NIfTI sform sheared": (lambda: case(suffix=".nii").then(header(280, "2f", 2.0, 0.9)), "sheared"),
    "NIfTI sform elsewhere": (lambda: case(suffix=".nii").then(header(292, "f", 55.0)), "sform and qform"),
    "NIfTI sform of another size": (lambda: case(suffix=".nii").then(header(80, "f", 2.5)), "by pixdim"),
    "NIfTI sform that is no number": (lambda: case(suffix=".nii").then(header(280, "f", np.nan)), "not a number"),
    "NIfTI huge": (lambda: case(suffix=".nii").then(header(42, "3h", 30000, 30000, 30000)), "damaged or truncated"),
    "NIfTI data offset": (lambda: case(suffix=".nii").then(header(108, "f", -5.0)), "data offset"),
    "MetaImage origin": (lambda: case().then(line("Offset", "nan 0 0")), "Offset"),
    "MetaImage spacing": (lambda: case().then(line("ElementSpacing", "2 2 -2")), "ElementSpacing"),
    "MetaImage axes": (lambda: case().then(line("TransformMatrix", "1 0 0 0.5 1 0 0 0 1")), "does not define a position in space"),
    "MetaImage huge": (lambda: case().then(line("DimSize", "30000 30000 30000")), "damaged or truncated"),
    "2-D": (lambda: sample().change(lambda i: i[:, :, 30], DWI), "not 3-D"),
    "single slice": (lambda: sample().change(lambda i: i[:, :, 30:31]), "single slice"),
    "colour": (lambda: sample().change(lambda i: sitk.Compose(i, i, i), DWI), "not scalar"),
    "complex": (lambda: sample().change(lambda i: sitk.RealAndImaginaryToComplex(i, i), DWI), "not scalar"),
    "three volumes, no b-values": (lambda: case(suffix=".nii").change(odd.stack(3, 1, 1), DWI), "which of its volumes"),
    "pair the other way round": (lambda: case(suffix=".nii").change(odd.stack(1, 3), DWI), "is not diffusion-weighted"),
    "too few b-values": (lambda: volumes((3, 1), "0"), "1 numbers for 2 volumes"),
    "b-values that are none": (lambda: volumes((3, 1), "a b"), "not valid"),
    "low b-values only": (lambda: volumes((3, 1), "0 50"), "no volume"),
    "ADC of two volumes": (lambda: case(suffix=".nii").change(odd.stack(1, 2), ADC), "not 3-D"),
    "swapped": (swapped, "DWI and ADC look swapped"),
    "b0 as DWI": (lambda: sample().change(unweighted, DWI), "not diffusion-weighted"),
    "exponential ADC": (lambda: sample().change(exponential, ADC), "not a map of diffusion coefficients"),
    "DWI twice": (lambda: case().then(lambda f: shutil.copy(f[DWI], f[ADC])), "the same image"),
    "constant": (lambda: sample().change(lambda i: i * 0 + 3, DWI), "constant"),
    "nothing but NaN": (lambda: sample().change(at_places(np.nan, lambda a: a == a), ADC), "no finite value"),
    "NaN in the brain": (lambda: sample().change(at_places(np.nan, one_inside), ADC), "1 of them in brain tissue"),
    "infinite value in the brain": (lambda: sample().change(at_places(np.inf, one_inside), DWI), "1 of them in brain tissue"),
    "NaN in FLAIR's brain": (lambda: sample(flair=True).change(at_places(np.nan, one_inside), FLAIR), "the FLAIR image holds"),
    "ADC elsewhere": (lambda: sample().change(turned(0, (400, 0, 0)), ADC), "covers too little"),
    "ADC of half the head": (lambda: sample().change(cropped(0, 0, 36, 0, 0, 0), ADC), "does not cover enough of the brain"),
    "half of DWI empty": (lambda: sample().change(at_places(0, FIRST_HALF), DWI), "different parts of the head"),
    "half of ADC empty": (lambda: sample().change(at_places(0, FIRST_HALF), ADC), "different parts of the head"),
    "ADC in no unit": (lambda: sample().change(lambda i: i * 30, ADC), "no usual unit"),
    "DWI clipped": (lambda: sample().change(brighter_than(0.36), DWI), "clipped"),
    "FLAIR elsewhere": (lambda: sample(flair=True).change(turned(0, (0, 300, 0)), FLAIR), "FLAIR covers too little of the brain on DWI"),
    "FLAIR constant": (lambda: sample(flair=True).change(lambda i: i * 0, FLAIR), "the FLAIR image is constant"),
    "DICOM slice missing": (lambda: case().then(lambda f: as_dicom(f, spoil=lambda s: s[20].unlink())), "lacks slices"),
    "DICOM slice cut off": (lambda: case().then(lambda f: as_dicom(f, spoil=lambda s: shortened(s[-1], 500))), "damaged"),
    "archive of no DICOM": (lambda: case().then(archived_as_it_is), "no DICOM images"),
    "archive cut off": (lambda: case().then(archived).then(lambda f: shortened(f[DWI].with_name("scan.zip"), 999)), "archive is damaged"),
    "inputs.json": (lambda: case().then(lambda f: (f[DWI].parents[2] / "inputs.json").write_text("{")), "inputs.json"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_broken_inputs_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    build, message = REFUSED[name]
    root = build().write(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an earlier case")
    code = main(["--input", str(root), "--output", str(tmp_path / "out"), "--device", "cpu"])
    said, errors = capfd.readouterr()
    assert code == 3, said
    assert message in said
    assert "Traceback" not in said
    assert " ".join(message.split()) in write_final_error_line(errors)
    assert tree(tmp_path / "out") == {"results.json": b"of an earlier case"}


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ACCEPTED) + len(REFUSED) >= 80
