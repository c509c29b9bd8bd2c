"""Every kind of DICOM object that scanners write: the same image from each, or a refusal that names what is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from conftest import GRID, phantom_arrays
from dicom_files import (
    LEGACY_MR,
    edited,
    save,
    whole,
    write_enhanced,
    write_mosaic,
    write_series,
    write_tiles,
)
from ensemble.errors import InputRefused
from ensemble.readers.dicom.facts import SeriesKind, kind_from_description
from ensemble.readers.imagefile import read_image
from ensemble.types import Modality
from ensemble.volume import Volume

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
SMALL = replace(GRID, size=(12, 10, 7), spacing_mm=(4.0, 3.5, 5.0))
ARRAYS = phantom_arrays(SMALL)
WEIGHTED, UNWEIGHTED = Volume(ARRAYS[DWI], SMALL), Volume(ARRAYS[DWI] * 2.5, SMALL)
ADC_MAP = Volume(ARRAYS[ADC], SMALL)


def rolled(turns: int, volume: Volume = WEIGHTED) -> Volume:
    """The same image acquired with its slices along another axis: sagittal or coronal."""
    matrix = np.roll(np.reshape(volume.grid.direction, (3, 3)), turns, axis=1)
    return Volume(volume.array, replace(volume.grid, direction=tuple(matrix.ravel().tolist())))


def left_handed(volume: Volume = WEIGHTED) -> Volume:
    """The same grid with its slices counted downwards."""
    matrix = np.reshape(volume.grid.direction, (3, 3)) * (1, 1, -1)
    return Volume(volume.array, replace(volume.grid, direction=tuple(matrix.ravel().tolist())))


def same_in_the_world(image: Volume, expected: Volume, tolerance: float = 0.5) -> None:
    """Assert that two volumes hold the same values (by default but for rounding) at the same places, whatever the order of their axes."""
    apart = np.linalg.inv(image.grid.affine) @ expected.grid.affine
    nearest = np.round(apart)
    assert np.abs(apart - nearest).max() < 1e-3, apart
    z, y, x = np.indices(expected.array.shape).reshape(3, -1)
    at_x, at_y, at_z, _ = (nearest @ np.stack([x, y, z, np.ones_like(x)])).astype(int)
    assert image.array.size == expected.array.size
    assert min(at_x.min(), at_y.min(), at_z.min()) == 0
    there = image.array[at_z, at_y, at_x].astype(np.float64)
    assert np.abs(there - expected.array.ravel()).max() <= tolerance


def classic(root: Path, volume: Volume = WEIGHTED) -> None:
    write_series(UNWEIGHTED if volume is WEIGHTED else volume, root, description="diff", b=0)
    write_series(volume, root, description="diff", b=1000, first=101)


#: How scanners write a DWI of b 0 and 1000.
KINDS: dict[str, Callable[[Path], object]] = {
    "classic": classic,
    "Enhanced": lambda root: write_enhanced([(0, UNWEIGHTED), (1000, WEIGHTED)], root / "a", description="diff"),
    "Enhanced, groups per frame": lambda root: write_enhanced([(0, UNWEIGHTED), (1000, WEIGHTED)], root / "a.dcm", shared=False),
    "Enhanced, b 1000 first": lambda root: write_enhanced([(1000, WEIGHTED), (0, UNWEIGHTED)], root / "a.dcm"),
    "Enhanced, one file a volume": lambda root: [
        write_enhanced([(b, volume)], root / f"{b}.dcm", number=n)
        for n, (b, volume) in enumerate([(0, UNWEIGHTED), (1000, WEIGHTED)], start=1)
    ],
    "Enhanced, one volume": lambda root: write_enhanced([(1000, WEIGHTED)], root / "a.dcm"),
    "Enhanced, without b of b0": lambda root: write_enhanced([(None, UNWEIGHTED), (1000, WEIGHTED)], root / "a.dcm"),
    "Legacy Converted": lambda root: write_enhanced(
        [(None, UNWEIGHTED), (None, WEIGHTED)], root / "a.dcm", sop_class=LEGACY_MR, change=converted_b(0, 1000)
    ),
    "mosaic": lambda root: [write_mosaic(UNWEIGHTED, root / "0.IMA", b=0), write_mosaic(WEIGHTED, root / "1.IMA", number=2, b=1000)],
    "mosaic, downwards": lambda root: write_mosaic(WEIGHTED, root / "1.IMA", b=1000, downwards=True),
    "tiles": lambda root: [write_tiles(UNWEIGHTED, root / "0", b=1.25), write_tiles(WEIGHTED, root / "1", number=2, b=928.3)],
}  # fmt: skip


def converted_b(*b_values: float) -> Callable[[Dataset], None]:
    """b-values as a conversion leaves them: a vendor's own elements, put aside frame by frame."""

    def change(dataset: Dataset) -> None:
        dataset.Manufacturer = "SIEMENS"
        frames = dataset.PerFrameFunctionalGroupsSequence
        for k, frame in enumerate(frames):
            kept = Dataset()
            kept.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(
                0x0C, "IS", str(b_values[k * len(b_values) // len(frames)])
            )
            frame.UnassignedPerFrameConvertedAttributesSequence = Items([kept])

    return change


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_image(tmp_path: Path, kind: str, archive: bool) -> None:
    KINDS[kind](tmp_path / "a")
    path = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")) if archive else tmp_path / "a"
    same_in_the_world(read_image(path, DWI).volume, WEIGHTED)


def test_a_file_alone_is_read_where_it_holds_a_series(tmp_path: Path) -> None:
    path = write_enhanced([(0, UNWEIGHTED), (1000, WEIGHTED)], tmp_path / "a.dcm")
    same_in_the_world(read_image(path, DWI).volume, WEIGHTED)


WRITERS: dict[str, Callable[[Volume, Path], object]] = {
    "classic": lambda volume, root: write_series(volume, root, b=1000),
    "Enhanced": lambda volume, root: write_enhanced([(1000, volume)], root / "a"),
    "tiles": lambda volume, root: write_tiles(volume, root / "a", b=1000),
    "mosaic": lambda volume, root: write_mosaic(volume, root / "a", b=1000),
}
PLANES = {
    "coronal": rolled(1),
    "sagittal": rolled(2),
    "downwards": left_handed(),
    "sagittal, right to left": left_handed(rolled(1)),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("plane", PLANES)
def test_any_plane_in_any_order(tmp_path: Path, plane: str, kind: str) -> None:
    WRITERS[kind](PLANES[plane], tmp_path / "a")
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, PLANES[plane])


# --- b-values ---------------------------------------------------------------------------------------------------------------------------


def private(
    group: int, creator: str, maker: str, element: int, vr: str, value: object
) -> Callable[[Dataset, int], None]:
    """An element of a vendor; without a creator, as bytes, which is what de-identification leaves."""

    def change(dataset: Dataset, z: int) -> None:
        dataset.Manufacturer = maker
        if creator:
            dataset.private_block(group, creator, create=True).add_new(element, vr, value)
        else:
            dataset.add_new((group, 0x1000 | element), "UN", value)

    return change


#: Where a vendor tells that b = 1000.
VENDORS = {
    "Siemens": private(0x19, "SIEMENS MR HEADER", "SIEMENS", 0x0C, "IS", "1000"),
    "GE": private(0x43, "GEMS_PARM_01", "GE MEDICAL SYSTEMS", 0x39, "IS", [1000, 8, 0, 0]),
    "GE, with its millions": private(0x43, "GEMS_PARM_01", "GE MEDICAL SYSTEMS", 0x39, "IS", [1000001000, 8, 0, 0]),
    "Philips": private(0x2001, "Philips Imaging DD 001", "Philips Medical Systems", 0x03, "FL", 1000.0),
    "United Imaging": private(0x65, "Image Private Header", "UIH", 0x09, "FD", 1003.2),
    "Siemens, no creator": private(0x19, "", "SIEMENS", 0x0C, "UN", b"1000"),
    "GE, no creator": private(0x43, "", "GE MEDICAL SYSTEMS", 0x39, "UN", b"1000\\8\\0\\0 "),
    "Philips, no creator": private(0x2001, "", "Philips Medical Systems", 0x03, "UN", np.float32(1000).tobytes()),
    "United Imaging, no creator": private(0x65, "", "UIH", 0x09, "UN", np.float64(1000).tobytes()),
    "name of the sequence": lambda dataset, z: setattr(dataset, "SequenceName", "*ep_b1000#3"),
}


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("vendor", VENDORS)
def test_b_stands_where_the_vendor_puts_it(tmp_path: Path, vendor: str, implicit: bool) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", change=VENDORS[vendor])
    for path in files if implicit else []:
        recoded(path, ImplicitVRLittleEndian)
    (note, *_) = read_image(tmp_path / "a", DWI).notes
    assert "b = 100" in note


def test_another_vendors_element_is_no_b_value(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "a", change=private(0x19, "GEMS_ACQU_01", "GE MEDICAL SYSTEMS", 0x0C, "IS", "3"))
    assert "b = " not in read_image(tmp_path / "a", DWI).notes[0]


def test_a_b0_without_b_value_is_told_by_the_others(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", description="DTI")
    write_series(WEIGHTED, tmp_path / "a", description="DTI", b=1000, first=101)
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert any("taken as b = 0" in note for note in image.notes)


def test_derived_images_without_b_among_acquired_ones_are_no_b0(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", description="DTI", image_type="DERIVED\\PRIMARY")
    write_series(WEIGHTED, tmp_path / "a", description="DTI", b=1000, first=101)
    with pytest.raises(InputRefused):
        read_image(tmp_path / "a", DWI)


@pytest.mark.parametrize("spread", [0.0, 3e-4, 20.0])
def test_b_values_that_scatter_are_one_shell(tmp_path: Path, spread: float) -> None:
    for n in range(2):
        for z, path in enumerate(write_series(WEIGHTED, tmp_path / "a", b=1000, first=1 + 100 * n)):
            edited(
                path, lambda dataset, away=spread * (-1) ** (z + n): setattr(dataset, "DiffusionBValue", 1000 + away)
            )
    assert "geometric mean of 2" in read_image(tmp_path / "a", DWI).notes[1]


def lone(
    description: str,
    b: float | None = None,
    kind: str = "ORIGINAL\\PRIMARY",
    change: Callable[[Dataset, int], object] = lambda dataset, z: None,
) -> Callable[[Path], object]:
    """A series that is no DWI."""
    return lambda root: write_series(
        WEIGHTED, root, description=description, uid="9", b=b, image_type=kind, change=change
    )


def of_class(uid: str) -> Callable[[Dataset, int], None]:
    return lambda dataset, z: setattr(dataset, "SOPClassUID", uid)


def enhanced(b: float | None, kind: str) -> Callable[[Path], object]:
    return lambda root: write_enhanced(
        [(b, WEIGHTED)], root / "9", description="diff", uid="9", number=9, image_type=kind
    )


def mosaic(b: float, csa: bool) -> Callable[[Path], object]:
    return lambda root: write_mosaic(WEIGHTED, root / "9.IMA", description="diff", uid="9", number=9, b=b, csa=csa)


def derivation(code: str) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, z: int) -> None:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator = code, "DCM"
        dataset.DerivationCodeSequence = Items([item])

    return change


def in_colour(dataset: Dataset, z: int) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(dataset.Rows * dataset.Columns * 3)


def captured(dataset: Dataset, z: int) -> None:
    in_colour(dataset, z)
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient


FRACTIONAL, EXPONENTIAL, DERIVED = "fractional anisotropy", "exponential ADC", "DERIVED\\PRIMARY\\DIFFUSION\\"
ALONE: dict[str, tuple[Callable[[Path], object], str]] = {
    "b0": (lone("ep2d_diff", 0), "b = 0"),
    "b0 without a name": (lone("", 0), "b = 0"),
    "b 2500": (lone("ep2d_diff_TRACEW", 2500), "b = 2500"),
    "b 2500, Enhanced": (enhanced(2500, DERIVED + "TRACEW"), "b = 2500"),
    "b 50": (mosaic(50, csa=True), "b = 50"),
    "FA by name": (lone("ep2d_diff_FA"), FRACTIONAL),
    "FA by type": (lone("diff", kind=DERIVED + "FA"), FRACTIONAL),
    "FA, Enhanced": (enhanced(None, DERIVED + "FA"), FRACTIONAL),
    "FA with a b-value": (lone("DTI", 1000, DERIVED + "FA"), FRACTIONAL),
    "exponential ADC by name": (lone("ep2d_diff_eADC", 1000), EXPONENTIAL),
    "exponential ADC in words": (lone("Exponential Apparent Diffusion Coefficient"), EXPONENTIAL),
    "exponential ADC by type": (lone("diff", kind="DERIVED\\PRIMARY\\EADC\\EADC"), EXPONENTIAL),
    "exponential ADC by derivation": (lone("diff", change=derivation("113045")), EXPONENTIAL),
    "tensor": (lone("diff", kind=DERIVED + "TENSOR_B0"), "diffusion tensor"),
    "colour FA": (lone("diff_ColFA", change=in_colour), "colour image"),
    "colour FA, secondary capture": (lone("diff_ColFA", change=captured), "screenshot"),
    "screenshot": (lone("diff", change=of_class("1.2.840.10008.5.1.4.1.1.7")), "screenshot"),
    "private class": (lone("diff", change=of_class("1.3.46.670589.11.0.0.12.2")), "private class"),
    "localizer": (lone("localizer"), "localizer"),
    "phase": (lone("diff", 1000, "ORIGINAL\\PRIMARY\\P\\ND"), "phase image"),
    "T1": (lone("t1_mprage_sag"), "another contrast"),
    "perfusion": (lone("ep2d_perf_CBF"), "another contrast"),
    "T2": (lone("t2_tse_tra"), "another contrast"),
    "real part": (lone("diff", 1000, "ORIGINAL\\PRIMARY\\R_SE\\R\\SE"), "real or imaginary"),
    "computed": (lone("diff", 1000, DERIVED + "CALC_BVALUE\\TRACEW"), "not measured"),
    "b0 by name": (lone("DWI b0"), "named b = 0"),
    "b 2500 by name": (lone("dwi_b=2500"), "named b = 2500"),
    "mosaic without CSA": (mosaic(1000, csa=False), "CSA header"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_dwi_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, found = ALONE[name]
    write(tmp_path / "a")
    with pytest.raises(InputRefused) as refusal:
        read_image(tmp_path / "a", DWI)
    assert found in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (SeriesKind.ADC, "DWI_ADCmap;isoADC diff;diff_ADCs;Diffusionskoeffizient;coeficiente de difusion aparente;Average DC;DTI AvDC"),
        (SeriesKind.EXPONENTIAL, "DWI eADCmap;exADC;exp-ADC;DWI attenuation"),
        (SeriesKind.ANISOTROPY, "DTI_FAmap;diff ColFA;fractional anisotropy"),
        (SeriesKind.DIFFUSIVITY, "diff_MK;DTI RD;DTI_L1;DTI nMD;DWI mask;diff stdev;DTI colour map;DWI_S0"),
        (SeriesKind.COMPUTED, "diff_CALC_BVAL;cDWI 1000;Synthetic DWI;calculated b1500"),
        (SeriesKind.PROJECTION, "DWI MIP;SWI_minIP"),
        (SeriesKind.PHASE, "Pha_Images"),
        (SeriesKind.OTHER, "t2_tse;T2W;T2* GRE;PD axial;gre_field_mapping;B0 map;DSC_EPI;relCBV;Mag_Images;T1map;QSM;STIR"),
        (SeriesKind.FLAIR, "t2_flair;t2_tirm_dark-fluid;t2_spc_da-fl_sag"),
        (SeriesKind.DWI, "Ax DWI;ep2d_diff_mddw_20;diff_3scan_trace;DTI_64;T2 b1000;DWI_reverse_phase;b1000 head;diff_headcoil;DWI_rAP"),
        (SeriesKind.UNKNOWN, ";head;ax;headcoil"),
    ],
    ids=lambda value: "" if isinstance(value, str) and ";" in value else str(value),
)  # fmt: skip
def test_names_tell_kinds(kind: SeriesKind, names: str) -> None:
    """In the words of several vendors and languages, of images that tell no b-value."""
    assert {name: kind_from_description([name], 0, weighted=False) for name in names.split(";")} == dict.fromkeys(
        names.split(";"), kind
    )


def of_part(name: str) -> Callable[[Dataset, int], None]:
    return lambda dataset, z: setattr(dataset, "ComplexImageComponent", name)


@pytest.mark.parametrize("how", ["PHASE", "REAL", "IMAGINARY", "GE", "type", "Enhanced"])
def test_parts_of_a_complex_signal_are_never_averaged_with_magnitudes(tmp_path: Path, how: str) -> None:
    """Though they lie in one series, with one b-value."""

    def parts(dataset: Dataset) -> None:
        for k, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            frame.MRImageFrameTypeSequence[0].ComplexImageComponent = "PHASE" if k < SMALL.size[2] else "MAGNITUDE"

    def ge(number: int) -> Callable[[Dataset, int], None]:
        return private(0x43, "GEMS_PARM_01", "GE MEDICAL SYSTEMS", 0x2F, "SS", number)

    if how == "Enhanced":
        both = [(1000.0, UNWEIGHTED), (1000.0, WEIGHTED)]
        write_enhanced(both, tmp_path / "a" / "1", description="diff", shared=False, change=parts)
    else:
        kind, change = "ORIGINAL\\PRIMARY", of_part(how)
        if how == "type":
            kind, change = "ORIGINAL\\PRIMARY\\I_SE\\I\\SE", of_part("")
        magnitude = ge(0) if how == "GE" else of_part("MAGNITUDE")
        write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000, change=magnitude)
        write_series(
            UNWEIGHTED,
            tmp_path / "a",
            description="diff",
            b=1000,
            first=101,
            image_type=kind,
            change=ge(1) if how == "GE" else change,
        )
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, WEIGHTED)


@pytest.mark.parametrize("acquired", ["ORIGINAL\\PRIMARY", "DERIVED\\PRIMARY\\ISO"], ids=["directions", "trace"])
def test_derived_images_under_the_same_b_value_are_left_out(tmp_path: Path, acquired: str) -> None:
    """Say, a map that tells the b-value of what it was made of, and nothing of what it is."""
    write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000, image_type=acquired)
    derived = "DERIVED\\SECONDARY"
    write_series(ADC_MAP, tmp_path / "a", description="diff", b=1000, first=101, image_type=derived)
    image = read_image(tmp_path / "a", DWI)
    same_in_the_world(image.volume, WEIGHTED)
    assert any("derived images (1 volumes) not used" in note for note in image.notes)


def test_unlike_images_of_one_b_value_are_refused(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000)
    write_series(UNWEIGHTED, tmp_path / "a", description="diff", b=1000, first=101)
    with pytest.raises(InputRefused, match="volumes of one b-value differ too much"):
        read_image(tmp_path / "a", DWI)


@pytest.mark.parametrize("unit", ["10^-6 mm2/s", "mm²/s", "ADC", "um^2/s or mm^2/s"])
def test_values_that_are_diffusivities_are_an_adc(tmp_path: Path, unit: str) -> None:
    extra = {"RescaleType": unit, "SpecificCharacterSet": "ISO_IR 192"}
    write_series(ADC_MAP, tmp_path / "a", description="DWI", b=1000, image_type="DERIVED\\SECONDARY", extra=extra)
    with pytest.raises(InputRefused, match="no DICOM series looks like DWI"):
        read_image(tmp_path / "a", DWI)
    assert np.array_equal(read_image(tmp_path / "a", ADC).volume.array, whole(ADC_MAP.array))


def test_combined_images_of_ge_are_means(tmp_path: Path) -> None:
    for number in range(3):
        write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000, first=1 + 100 * number)
    combined = Volume(WEIGHTED.array * 1.2, SMALL)
    kind = "DERIVED\\SECONDARY\\COMBINED"
    write_series(combined, tmp_path / "a", description="diff", b=1000, first=501, image_type=kind)
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, WEIGHTED)


def test_echoes_are_not_averaged(tmp_path: Path) -> None:
    for number, echo in enumerate(("80", "120")):
        extra = {"EchoTime": echo}
        write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000, first=1 + 100 * number, extra=extra)
    with pytest.raises(InputRefused, match="mixes echo times") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "80 to 120 ms" in refusal.value.found


def test_an_unweighted_image_may_have_another_echo_time(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", description="diff", b=0, extra={"EchoTime": "60"})
    write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000, first=101, extra={"EchoTime": "90"})
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, WEIGHTED)


def test_volumes_that_lie_aside_of_each_other_are_refused(tmp_path: Path) -> None:
    """Else the weighted one would stand where the first one lies."""
    moved = replace(SMALL, origin_mm=(SMALL.origin_mm[0] + 8, *SMALL.origin_mm[1:]))
    write_series(UNWEIGHTED, tmp_path / "a", description="diff", b=0)
    write_series(Volume(WEIGHTED.array, moved), tmp_path / "a", description="diff", b=1000, first=101)
    with pytest.raises(InputRefused, match="shifted against each other") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "8.0 mm" in refusal.value.found


@pytest.mark.parametrize("numbers", ["by volume", "by slice", "none", "of each volume", "at random"])
def test_without_b_values_numbers_must_tell_the_volumes(tmp_path: Path, numbers: str) -> None:
    """Files of names and numbers that an anonymiser gave: slices of two volumes are not mixed."""
    slices = SMALL.size[2]
    files = write_series(UNWEIGHTED, tmp_path / "a") + write_series(WEIGHTED, tmp_path / "a", first=101)
    random = np.random.default_rng(1).permutation(2 * slices)
    for k, path in enumerate(files):
        number = {"by slice": k % slices * 2 + k // slices, "of each volume": k % slices, "at random": random[k]}.get(
            numbers, k
        )
        edited(path, lambda dataset, number=number: setattr(dataset, "InstanceNumber", int(number)))
        if numbers == "none":
            edited(path, lambda dataset: dataset.__delattr__("InstanceNumber"))
        path.rename(path.with_name(f"{random[k]:03d}"))
    if numbers.startswith("by"):
        same_in_the_world(read_image(tmp_path / "a", DWI).volume, WEIGHTED)
    else:
        with pytest.raises(InputRefused, match="does not say which of its images form a volume"):
            read_image(tmp_path / "a", DWI)


@pytest.mark.parametrize("name", ALONE)
def test_beside_a_good_series_it_is_passed_over(tmp_path: Path, name: str) -> None:
    """With a note, unless it is plainly another thing."""
    ALONE[name][0](tmp_path / "a")
    write_series(WEIGHTED, tmp_path / "a", description="good diff", uid="5", b=1000)
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert "good diff" in image.notes[0]
    if name not in ("T1", "T2", "perfusion", "localizer", "b0 without a name"):
        assert "not used" in image.notes[1] or "none of them needed" in image.notes[1]
        assert ALONE[name][1] in " ".join(image.notes[1:])


@pytest.mark.parametrize("modality", [ADC, FLAIR])
@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("b0 without a name",)])
def test_nor_is_it_an_adc_or_a_flair(tmp_path: Path, name: str, modality: Modality) -> None:
    ALONE[name][0](tmp_path / "a")
    with pytest.raises(InputRefused):
        read_image(tmp_path / "a", modality)


@pytest.mark.parametrize("beside", ["ADC", "t1_mprage", "other", "ep2d_FA"])
def test_a_series_without_a_telling_name_is_what_the_user_says_only_if_it_is_alone(tmp_path: Path, beside: str) -> None:
    write_series(WEIGHTED, tmp_path / "a", description="ax head")
    ALONE["screenshot"][0](tmp_path / "a")
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))
    write_series(ADC_MAP, tmp_path / "a", description=beside, uid="2")
    with pytest.raises(InputRefused, match="no DICOM series looks like DWI"):
        read_image(tmp_path / "a", DWI)


def test_an_adc_map_has_no_b_value(tmp_path: Path) -> None:
    """Some scanners leave that of an image it was made of; or 0, with an average of several."""
    write_series(ADC_MAP, tmp_path / "a", description="dADC", b=1000)
    image = read_image(tmp_path / "a", ADC)
    assert np.array_equal(image.volume.array, whole(ADC_MAP.array))
    assert "b = " not in image.notes[0]


@pytest.mark.parametrize(
    ("words", "kind", "b_values"),
    [
        ({"SeriesDescription": "DWI_ADC"}, "ORIGINAL\\PRIMARY\\DIFFUSION\\NONE", (0, 1000)),
        ({"SeriesDescription": "Diffusion Tensor 12 dir"}, "ORIGINAL\\PRIMARY", (0, 1000)),
        ({"SeriesDescription": "DWI_ADC_TRACEW"}, "DERIVED\\PRIMARY\\DIFFUSION\\TRACEW", (1000,)),
        ({"SeriesDescription": "ep2d_TRACE", "ProtocolName": "DWI_ADC"}, "DERIVED\\PRIMARY", (1000,)),
        ({"SeriesDescription": "trace", "ProtocolName": "DWI_ADC"}, "DERIVED\\PRIMARY", (None,)),
    ],
)
def test_a_protocol_that_is_called_after_its_maps(
    tmp_path: Path, words: dict[str, object], kind: str, b_values: Sequence[float | None]
) -> None:
    for n, b in enumerate(b_values):
        volume = WEIGHTED if b is None or b > 0 else UNWEIGHTED
        write_series(volume, tmp_path / "a", b=b, first=1 + 100 * n, image_type=kind, extra=words)
    adc = {**words, "SeriesDescription": "x_ADC"}
    write_series(ADC_MAP, tmp_path / "a", uid="2", image_type="DERIVED\\PRIMARY\\DIFFUSION\\ADC", extra=adc)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))
    assert np.array_equal(read_image(tmp_path / "a", ADC).volume.array, whole(ADC_MAP.array))


def test_a_flair_may_say_that_it_has_b_0(tmp_path: Path) -> None:
    """Philips writes it into every image."""
    write_series(WEIGHTED, tmp_path / "a", description="T2 FLAIR", b=0)
    assert np.array_equal(read_image(tmp_path / "a", FLAIR).volume.array, whole(WEIGHTED.array))


def test_maps_under_the_series_uid_of_their_dwi_are_told_apart(tmp_path: Path) -> None:
    frames = [(None, ADC_MAP)]
    write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000)
    write_enhanced(
        frames, tmp_path / "a" / "adc", description="diff", number=900, image_type="DERIVED\\PRIMARY\\DIFFUSION\\ADC"
    )
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, WEIGHTED)
    same_in_the_world(read_image(tmp_path / "a", ADC).volume, ADC_MAP)


# --- directions and means ---------------------------------------------------------------------------------------------------------------


def philips(direction: str) -> Callable[[Dataset, int], None]:
    return private(0x2001, "Philips Imaging DD 001", "Philips", 0x04, "CS", direction)


def test_the_scanners_own_mean_is_taken_alone_where_there_are_no_directions(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", b=0, change=philips("I"))
    write_series(WEIGHTED, tmp_path / "a", b=1000, first=101, change=philips("I"))
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


@pytest.mark.parametrize("how", ["Philips", "Enhanced"])
def test_else_it_is_left_out_of_their_mean(tmp_path: Path, how: str) -> None:
    scaled = [Volume(whole(ARRAYS[DWI] * 10) * scale, SMALL) for scale in (0.8, 1.25, 1.4)]
    if how == "Philips":
        for n, (volume, direction) in enumerate(zip(scaled, "PSI", strict=True)):
            write_series(volume, tmp_path / "a", b=1000, first=1 + 100 * n, change=philips(direction))
    else:

        def isotropic(dataset: Dataset) -> None:
            for frame in dataset.PerFrameFunctionalGroupsSequence[14:]:
                frame.MRDiffusionSequence[0].DiffusionDirectionality = "ISOTROPIC"

        write_enhanced([(1000, volume) for volume in scaled], tmp_path / "a" / "1", change=isotropic)
    image = read_image(tmp_path / "a", DWI)
    head = ARRAYS[DWI] > 200
    assert np.allclose(image.volume.array[head], 10 * ARRAYS[DWI][head], rtol=0.01)
    assert any("geometric mean of 2" in note for note in image.notes)
    assert any("own mean over directions" in note for note in image.notes)


def test_of_dwi_series_that_nearest_b_1000_is_taken_and_of_several_the_trace(tmp_path: Path) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", description="diff", uid="1", b=1000)
    write_series(UNWEIGHTED, tmp_path / "a", description="diff_TRACEW", uid="2", b=2000)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(UNWEIGHTED.array))
    write_series(WEIGHTED, tmp_path / "a", description="diff_TRACEW", uid="3", b=1000)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


# --- places, tolerances, copies ----------------------------------------------------------------------------------------------------------


def moved_by(*mm: float) -> Callable[[Dataset, int], None]:
    """Each slice off by one of these distances, in turn."""

    def change(dataset: Dataset, z: int) -> None:
        dataset.ImagePositionPatient = [float(at) + mm[z % len(mm)] for at in dataset.ImagePositionPatient]

    return change


@pytest.mark.parametrize("away", [2e-6, 1e-3, 4e-3])
def test_places_across_a_rounding_edge_are_one(tmp_path: Path, away: float) -> None:
    write_series(UNWEIGHTED, tmp_path / "a", b=0, change=moved_by(-away))
    write_series(WEIGHTED, tmp_path / "a", b=1000, first=101, change=moved_by(away, -away))
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


@pytest.mark.parametrize("keyword", ["ImageOrientationPatient", "PixelSpacing"])
def test_axes_and_spacings_across_a_rounding_edge_are_one(tmp_path: Path, keyword: str) -> None:
    def change(dataset: Dataset, z: int) -> None:
        values = [float(value) for value in dataset[keyword].value]
        dataset[keyword].value = [value + 0.0005 - round(value % 0.001, 6) + (-1) ** z * 2e-6 for value in values]

    write_series(WEIGHTED, tmp_path / "a", b=1000, change=change)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_copies_of_an_instance_are_dropped_with_a_note(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    shutil.copytree(tmp_path / "a", tmp_path / "a" / "again")
    shutil.copy(files[2], files[2].with_name("once more.dcm"))
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert any("8 copies" in note for note in image.notes)


def test_two_pictures_under_one_instance_uid_are_no_copies(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    again = write_series(UNWEIGHTED, tmp_path / "b", b=1000)
    shutil.copy(again[2], files[2].with_name("other.dcm"))
    with pytest.raises(InputRefused, match="same SOP instance UID"):
        read_image(tmp_path / "a", DWI)


@pytest.mark.parametrize("uid", ["", "1.2.3.4"], ids=["no instance UIDs", "one instance UID for all"])
def test_instances_without_a_uid_of_their_own_are_all_kept(tmp_path: Path, uid: str) -> None:
    write_series(
        WEIGHTED,
        tmp_path / "a",
        b=1000,
        change=lambda d, z: setattr(d, "SOPInstanceUID", uid) if uid else d.pop("SOPInstanceUID"),
    )
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_a_series_uid_for_each_instance(tmp_path: Path) -> None:
    """As Canon exports; another series beside it stays another one."""
    for n, (b, volume) in enumerate([(None, UNWEIGHTED), (1000, WEIGHTED)]):
        for path in write_series(volume, tmp_path / "a", description="DWI", b=b, first=1 + 100 * n):
            edited(path, lambda dataset: setattr(dataset, "SeriesInstanceUID", f"1.9.{dataset.InstanceNumber}"))
    write_series(ADC_MAP, tmp_path / "a", description="ADC", uid="2")
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_a_series_uid_for_each_volume_of_one_series_number(tmp_path: Path) -> None:
    for n, (b, volume) in enumerate([(None, UNWEIGHTED), (1000, WEIGHTED)]):
        write_series(
            volume, tmp_path / "a", description="DWI", uid=str(n), b=b, first=1 + 100 * n, extra={"SeriesNumber": 7}
        )
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_interleaved_volumes_are_ordered_by_time(tmp_path: Path) -> None:
    """No b-values: the pair of b0 and DWI is told by temporal position, whatever the instance numbers."""
    for t, volume in enumerate([UNWEIGHTED, WEIGHTED]):
        for z, path in enumerate(write_series(volume, tmp_path / "a", description="diff", first=1 + 100 * (1 - t))):
            edited(
                path,
                lambda d, t=t, z=z: d.update({"TemporalPositionIdentifier": t + 1, "InstanceNumber": 2 * z + 2 - t}),
            )
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        (
            "Enhanced",
            lambda frames: frames[9].PlanePositionSequence[0].update({"ImagePositionPatient": [0, 0, 900]}),
            "lacks slices|is sheared",
        ),
        ("Enhanced", lambda frames: frames[9].PlanePositionSequence.clear(), "no valid slice position"),
        ("Enhanced", lambda frames: frames[9].MRDiffusionSequence[0].update({"DiffusionBValue": 0.0}), "lacks slices"),
        ("Enhanced", lambda frames: frames.pop(), "different number of frames"),
    ],
)
def test_multi_frame_files_are_checked_like_slices(
    tmp_path: Path, kind: str, spoil: Callable[[Items], object], message: str
) -> None:
    KINDS[kind](tmp_path / "a")
    edited(tmp_path / "a" / "a", lambda dataset: spoil(dataset.PerFrameFunctionalGroupsSequence))
    with pytest.raises(InputRefused, match=message):
        read_image(tmp_path / "a", DWI)


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
@pytest.mark.parametrize("slices", [slice(0, 7), slice(6, 7)], ids=["all", "the last"])
def test_slices_that_do_not_say_where_they_lie_are_refused(tmp_path: Path, keyword: str, slices: slice) -> None:
    for path in write_series(WEIGHTED, tmp_path / "a", b=1000)[slices]:
        edited(path, lambda dataset: dataset.pop(keyword))
    with pytest.raises(InputRefused, match="has no valid slice position"):
        read_image(tmp_path / "a", DWI)


def test_tiles_without_a_place_each_are_refused(tmp_path: Path) -> None:
    path = write_tiles(WEIGHTED, tmp_path / "a" / "1", b=1000)
    edited(path, lambda dataset: dataset[0x65, 0x1051].value.pop())
    with pytest.raises(InputRefused, match="tiles"):
        read_image(tmp_path / "a", DWI)


# --- stored values ------------------------------------------------------------------------------------------------------------------------


def recoded(path: Path, syntax: str) -> None:
    """Write a file in another transfer syntax of uncompressed pixels."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    if not little:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax == DeflatedExplicitVRLittleEndian:
        dataset.save_as(path, enforce_file_format=True)
        return
    bare = Dataset(dataset)
    bare.file_meta = dataset.file_meta
    pydicom.dcmwrite(path, bare, implicit_vr=implicit, little_endian=little, enforce_file_format=True)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian], ids=lambda s: s.name
)
def test_uncompressed_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    for path in write_series(WEIGHTED, tmp_path / "a", b=1000):
        recoded(path, syntax)
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert "b = 1000" in image.notes[0]


def compressed(path: Path, syntax: str) -> None:
    import gdcm

    if syntax == RLELossless:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(path, enforce_file_format=True)
        return
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless], ids=lambda s: s.name
)
@pytest.mark.parametrize("kind", ["classic", "Enhanced"])
def test_compressed_transfer_syntaxes(tmp_path: Path, kind: str, syntax: str) -> None:
    unsigned = Volume(np.abs(WEIGHTED.array), SMALL)
    if kind == "classic":
        write_series(unsigned, tmp_path / "a", b=1000)
    else:
        write_enhanced([(1000, unsigned)], tmp_path / "a" / "a.dcm")
    for path in (tmp_path / "a").iterdir():
        compressed(path, syntax)
    same_in_the_world(read_image(tmp_path / "a", DWI).volume, unsigned)


def test_a_syntax_without_a_decoder_is_refused_by_name(tmp_path: Path) -> None:
    for path in write_series(WEIGHTED, tmp_path / "a", b=1000):
        compressed(path, RLELossless)
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.4.201\0"[:20]))
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.\0", b"1.2.840.10008.1.2.5\0"))
    files = sorted((tmp_path / "a").iterdir())
    for path in files:
        edited(path, lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.4.201"))
    with pytest.raises(InputRefused, match="has an unsupported compression") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "High-Throughput" in refusal.value.found


@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_the_stored_ones_are_no_part_of_a_value(tmp_path: Path, signed: bool) -> None:
    def change(dataset: Dataset, z: int) -> None:
        values = np.frombuffer(dataset.PixelData, "<i2").astype(np.int32) - (700 if signed else 0)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(signed)
        dataset.PixelData = ((values & 0xFFF) | 0x5000).astype("<u2").tobytes()

    write_series(WEIGHTED, tmp_path / "a", b=1000, change=change)
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array) - (700 if signed else 0))


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    def change(dataset: Dataset, z: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{1 + z / 4}", f"{-z}"

    write_series(WEIGHTED, tmp_path / "a", b=1000, change=change)
    z = np.arange(7, dtype=np.float32)[:, None, None]
    assert np.allclose(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array) * (1 + z / 4) - z)


def test_only_the_public_rescale_is_applied(tmp_path: Path) -> None:
    change = private(0x2005, "Philips MR Imaging DD 001", "Philips", 0x0E, "FL", 0.02)
    write_series(ADC_MAP, tmp_path / "a", description="ADC", slope=0.5, change=change)
    assert np.abs(read_image(tmp_path / "a", ADC).volume.array - ADC_MAP.array).max() <= 0.25


@pytest.mark.parametrize("slices", [range(7), range(3, 7)], ids=["all", "some"])
def test_black_and_white_the_other_way_round_is_inverted_and_recorded(tmp_path: Path, slices: range) -> None:
    def change(dataset: Dataset, z: int) -> None:
        if z not in slices:
            return
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME1", 0
        dataset.PixelData = (65535 - np.frombuffer(dataset.PixelData, "<i2").astype(np.int64)).astype("<u2").tobytes()

    write_series(WEIGHTED, tmp_path / "a", b=1000, change=change)
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert any("MONOCHROME1" in note for note in image.notes)


# --- what else lies in a folder ----------------------------------------------------------------------------------------------------------


def report(path: Path, sop_class: str) -> Path:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = sop_class, "1.2.9", "1.2.8"
    dataset.SeriesDescription = "diff report"
    return save(dataset, path)


def test_objects_without_images_are_passed_over(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    for n, end in enumerate(("88.33", "11.1", "66", "104.1", "9.1.1", "88.59")):
        report(tmp_path / "a" / f"object{n}", f"1.2.840.10008.5.1.4.1.1.{end}")
    for name in ("DICOMDIR", "dicomdir.dcm"):
        report(tmp_path / "a" / name, "1.2.840.10008.1.3.10")
    for path in files:
        path.rename(path.with_suffix(""))
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


def test_nothing_but_reports_is_refused_saying_so(tmp_path: Path) -> None:
    report(tmp_path / "a" / "sr.dcm", "1.2.840.10008.5.1.4.1.1.88.33")
    with pytest.raises(InputRefused, match="no DICOM images") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "structured report" in refusal.value.found
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("nothing")
    with pytest.raises(InputRefused, match="no DICOM images") as refusal:
        read_image(tmp_path / "b", DWI)
    assert refusal.value.found == "no DICOM files"
    assert "the DWI series" in refusal.value.do


def test_damage_elsewhere_is_a_note(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "a" / "1", description="diff", b=1000)
    other = write_series(WEIGHTED, tmp_path / "a" / "2", description="t2_tse", uid="2")
    other[3].write_bytes(other[3].read_bytes()[:-50])
    other[4].write_bytes(b"no DICOM")
    image = read_image(tmp_path / "a", DWI)
    assert np.array_equal(image.volume.array, whole(WEIGHTED.array))
    assert "t2_tse" in image.notes[1] or "t2_tse" in image.notes[2]
    assert other[4].name in " ".join(image.notes)


def test_damage_among_the_series_own_files_is_not(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000)
    for kept in (140, 300, 700, files[-1].stat().st_size - 1):
        content = files[-1].read_bytes()
        files[-1].write_bytes(content[:kept])
        with pytest.raises(InputRefused, match="damaged"):
            read_image(tmp_path / "a", DWI)
        files[-1].write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset: setattr(dataset, "SeriesInstanceUID", "1.2.3.77"),
        lambda dataset: setattr(dataset, "SeriesDescription", "dxff"),
        lambda dataset: setattr(dataset, "StudyInstanceUID", "1.2.5"),
        lambda dataset: setattr(dataset, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"),
        lambda dataset: setattr(dataset, "SamplesPerPixel", 3),
        lambda dataset: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "P"]),
    ],
    ids=["series", "description", "study", "class", "colour", "type"],
)
@pytest.mark.parametrize("end", [0, -1])
def test_a_slice_at_an_end_that_calls_itself_something_else_is_not_lost(
    tmp_path: Path, change: Callable[[Dataset], object], end: int
) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000)
    edited(files[end], change)
    with pytest.raises(InputRefused) as refusal:
        read_image(tmp_path / "a", DWI)
    assert files[end].name in refusal.value.where or "several DICOM series could be" in refusal.value.what


def test_no_damaged_byte_loses_a_slice(tmp_path: Path) -> None:
    """Of the last one, which nothing but its own header tells of."""
    files = write_series(WEIGHTED, tmp_path / "a", description="diff", b=1000)
    content = files[-1].read_bytes()
    draw = np.random.default_rng(0)
    for at in draw.choice(np.arange(128, len(content) - 2 * 12 * 10), 150, replace=False):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(draw.integers(8))
        files[-1].write_bytes(damaged)
        try:
            assert read_image(tmp_path / "a", DWI).volume.grid.size == SMALL.size, at
        except InputRefused:
            continue


def test_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    for path in write_series(WEIGHTED, tmp_path / "a", b=1000):
        recoded(path, ImplicitVRLittleEndian)
        content = path.read_bytes()
        (at,) = [k for k in range(132, 400) if content[k : k + 4] == b"\x08\x00\x08\x00"]
        path.with_suffix("").write_bytes(content[at:])
        path.unlink()
    assert np.array_equal(read_image(tmp_path / "a", DWI).volume.array, whole(WEIGHTED.array))


@pytest.mark.parametrize("charset", ["ISO_IR 192", "ISO_IR 100", "ISO 2022 IR 87", "NONSENSE"])
def test_character_sets(tmp_path: Path, charset: str) -> None:
    write_series(
        WEIGHTED, tmp_path / "a", b=1000, extra={"SpecificCharacterSet": charset, "SeriesDescription": "Kopf diff"}
    )
    assert "Kopf diff" in read_image(tmp_path / "a", DWI).notes[0]


def test_sequences_without_end_or_bottom_are_refused(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    content = files[3].read_bytes()
    at = content.index(b"\x18\x00\x24\x00") if b"\x18\x00\x24\x00" in content else content.index(b"\x18\x00\x87\x90")
    deep = b"\x18\x00\x12\x90SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 20_000
    long = b"\x18\x00\x12\x90OB\0\0\xf0\xff\xff\xff"
    many = b"\x18\x00\x12\x90SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 1_000_000
    for inserted in (deep, long, many):
        files[3].write_bytes(content[:at] + inserted + content[at:])
        with pytest.raises(InputRefused, match="damaged"):
            read_image(tmp_path / "a", DWI)


def test_a_deflated_file_may_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    for path in files:
        recoded(path, DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("ensemble.readers.dicom.header._MAX_INFLATED_BYTES", 500)
    with pytest.raises(InputRefused, match="damaged"):
        read_image(tmp_path / "a", DWI)


def test_a_compressed_image_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    files = write_series(WEIGHTED, tmp_path / "a", b=1000)
    for path in files:
        compressed(path, JPEGLSLossless)
    content = files[2].read_bytes()
    at = content.index(b"\xff\xf7") + 5
    files[2].write_bytes(content[:at] + b"\xff\xf0\xff\xf0" + content[at + 4 :])
    with pytest.raises(InputRefused, match="damaged") as refusal:
        read_image(tmp_path / "a", DWI)
    assert "65520" in refusal.value.found
