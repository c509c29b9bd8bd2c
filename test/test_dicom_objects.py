"""DICOM objects made of a case: they say what the mask says, of the images that held its slices, in the study that these belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ImplicitVRLittleEndian

from conftest import phantom_arrays, shared, write_image
from dicom_files import LEGACY_MR, edited, write_enhanced, write_mosaic, write_series, write_tiles
from dicom_objects import dciodvfy, segmented
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.contract import execute
from ensemble.contract.isles22 import ContractCase
from ensemble.errors import InputRefused
from ensemble.findings import find
from ensemble.findings.types import LesionLocations, StructureVolume, UncertainQuantity
from ensemble.geometry import Grid
from ensemble.outputs.artifacts import case_artifacts
from ensemble.outputs.dicom.measurements import build_measurement_report
from ensemble.outputs.dicom.picture import build_secondary_capture
from ensemble.outputs.dicom.segmentation import build_mask_segmentation, build_probability_segmentation
from ensemble.outputs.dicom.study import require_one_study
from ensemble.outputs.formats import FORMATS
from ensemble.outputs.segmented import SegmentedCase
from ensemble.progress import LogWatcher
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.imagefile import read_image
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

DWI, ADC = Modality.DWI, Modality.ADC
TURN = (0.36, -0.48, 0.8, 0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
SMALL = Grid((14, 11, 5), (2.5, 2.0, 4.0), (-11.5, 20.25, -30.0), TURN)
WEIGHTED = Volume(np.random.default_rng(4).uniform(100, 400, SMALL.shape_zyx).round().astype(np.float32), SMALL)
UNWEIGHTED = Volume((WEIGHTED.array * 2).astype(np.float32), SMALL)


def in_reverse(volume: Volume, root: Path) -> None:
    """Instances numbered from the top down, and named so."""
    for z, file in enumerate(write_series(volume, root, b=1000)):
        edited(file, lambda dataset, z=z: setattr(dataset, "InstanceNumber", 100 - z)).rename(
            root / f"{100 - z:03d}.dcm"
        )


SOURCES: dict[str, Callable[[Path], object]] = {
    "classic": lambda root: write_series(WEIGHTED, root, b=1000),
    "classic, b0 beside it": lambda root: [
        write_series(UNWEIGHTED, root, b=0),
        write_series(WEIGHTED, root, b=1000, first=101),
    ],
    "classic, three directions": lambda root: [
        write_series(WEIGHTED, root, b=1000, first=1 + 100 * n) for n in range(3)
    ],
    "classic, numbered from the top": lambda root: in_reverse(WEIGHTED, root),
    "Enhanced": lambda root: write_enhanced([(0, UNWEIGHTED), (1000, WEIGHTED)], root / "a.dcm"),
    "Enhanced, groups per frame": lambda root: write_enhanced(
        [(1000, WEIGHTED), (0, UNWEIGHTED)], root / "a.dcm", shared=False
    ),
    "Enhanced, a file a volume": lambda root: [
        write_enhanced([(b, volume)], root / f"{b}.dcm", number=n)
        for n, (b, volume) in enumerate([(0, UNWEIGHTED), (1000, WEIGHTED)], start=1)
    ],
    "Legacy Converted": lambda root: write_enhanced([(1000, WEIGHTED)], root / "a.dcm", sop_class=LEGACY_MR),
    "mosaic": lambda root: [
        write_mosaic(UNWEIGHTED, root / "0.IMA", b=0),
        write_mosaic(WEIGHTED, root / "1.IMA", number=2, b=1000),
    ],
    "mosaic, downwards": lambda root: write_mosaic(WEIGHTED, root / "1.IMA", b=1000, downwards=True),
    "tiles": lambda root: [
        write_tiles(UNWEIGHTED, root / "0", b=1.25),
        write_tiles(WEIGHTED, root / "1", number=2, b=928.3),
    ],
}


def written(dataset: Dataset) -> bytes:
    content = BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


def read_back(dataset: Dataset) -> Dataset:
    return pydicom.dcmread(BytesIO(written(dataset)))


def sources(root: Path) -> dict[str, Dataset]:
    return {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, filter(Path.is_file, root.rglob("*")))}


def planes_of(source: Dataset, item: Dataset) -> Iterator[AnyArray]:
    """The stored planes that a reference names."""
    pixels = source.pixel_array if source.get("NumberOfFrames") else source.pixel_array[None]
    for number in np.atleast_1d(item.get("ReferencedFrameNumber", 1)):
        yield pixels[int(number) - 1]


@pytest.mark.parametrize("kind", SOURCES)
def test_each_frame_is_the_masks_slice_and_names_the_image_that_held_it(tmp_path: Path, kind: str) -> None:
    SOURCES[kind](tmp_path)
    image, stored = read_image(tmp_path, DWI), sources(tmp_path)
    case = segmented(image)
    dataset = read_back(build_mask_segmentation(case))
    mask = case.result.fused.mask.array
    assert np.array_equal(dataset.pixel_array.astype(bool), mask)
    assert mask.any(axis=(1, 2))[[0, -1]].all(), "the first and the last slice are told apart"
    assert len(dataset.PerFrameFunctionalGroupsSequence) == len(mask)
    for z, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        assert np.abs(position - image.volume.grid.affine[:3] @ (0, 0, z, 1)).max() < 1e-3
        (derivation,) = group.DerivationImageSequence
        assert len(derivation.SourceImageSequence) == (3 if "directions" in kind else 1)
        for item in derivation.SourceImageSequence:
            source = stored[item.ReferencedSOPInstanceUID]
            assert item.ReferencedSOPClassUID == source.SOPClassUID
            assert ("ReferencedFrameNumber" in item) == ("NumberOfFrames" in source)
            assert ("SpatialLocationsPreserved" in item) == ("mosaic" not in kind and kind != "tiles")
            for plane in planes_of(source, item):
                assert holds(plane, image.volume.array[z])


def holds(plane: AnyArray, slice_: AnyArray) -> bool:
    """Whether a stored plane is a slice, or a square of tiles one of which is."""
    rows, columns = slice_.shape
    tiles = (
        plane[row : row + rows, column : column + columns]
        for row in range(0, plane.shape[0], rows)
        for column in range(0, plane.shape[1], columns)
    )
    return any(tile.shape == slice_.shape and np.abs(tile - slice_).max() < 1e-2 for tile in tiles)


@pytest.mark.parametrize("kind", SOURCES)
def test_highdicom_and_dicom3tools_find_nothing_wrong(tmp_path: Path, kind: str) -> None:
    SOURCES[kind](tmp_path / "in")
    case = segmented(read_image(tmp_path / "in", DWI))
    files = {}
    for artifact in case_artifacts(case, ExtraOutputs(dicom=True, dicom_probability=True)):
        if artifact.role.format == "dicom":
            files[artifact.role.name] = tmp_path / f"{artifact.role.name}.dcm"
            FORMATS["dicom"].write(artifact.payload, files[artifact.role.name])
    read_by_highdicom(case, files["segmentation"], files["measurements"])
    mean = highdicom.seg.segread(files["probability"]).pixel_array / 255
    assert np.abs(mean - case.result.fused.mean.array).max() <= 0.5 / 255 + 1e-6
    assert [error for path in files.values() for error in dciodvfy(path)] == []


def read_by_highdicom(case: SegmentedCase, segmented_file: Path, report_file: Path) -> None:
    volume = highdicom.seg.segread(segmented_file).get_volume(combine_segments=True)
    there = places(volume.affine, np.argwhere(volume.array > 0))
    ours = places(case.result.case.grid.affine, np.argwhere(case.result.fused.mask.array)[:, ::-1])
    apart = np.linalg.norm(there[:, None] - ours[None], axis=2)
    assert len(there) == len(ours)
    assert max(apart.min(axis=0).max(), apart.min(axis=1).max()) < 0.05
    report = highdicom.sr.srread(report_file)
    (group,) = report.content.get_volumetric_roi_measurement_groups()
    told = {
        (m.name.meaning, m.derivation.meaning if m.derivation else ""): (m.value, m.unit.value)
        for m in group.get_measurements()
    }
    assert told["Volume", ""] == (pytest.approx(case.result.lesion_ml, abs=1e-3), "mL")
    assert told["Number of lesions", ""] == (case.result.lesion_count, "1")
    assert 0 < told["Volume", "Maximum"][0] <= told["Volume", ""][0]


def places(affine: AnyArray, index: AnyArray) -> AnyArray:
    """World positions (n, 3) of voxels."""
    return np.asarray((affine[:3, :3] @ index.T).T + affine[:3, 3])


VENDORS = {
    "canon_enhanced": DWI,
    "ge_implicit_no_creator": DWI,
    "philips_export_with_private_objects": DWI,
    "siemens_mosaic_oblique": DWI,
    "siemens_xa30_classic_exam": ADC,
    "siemens_xa30_enhanced_trace_adc": ADC,
    "toshiba_b0_without_tag": DWI,
    "uih_vframe": DWI,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VENDORS)
def test_objects_of_vendors_files(tmp_path: Path, name: str) -> None:
    folder = shared(f"dicom/{name}") / "dicom"
    image, stored = read_image(folder, VENDORS[name]), sources(folder)
    case = segmented(image)
    files = {}
    for what, make in (
        ("seg", build_mask_segmentation),
        ("sr", build_measurement_report),
        ("sc", build_secondary_capture),
        ("fraction", build_probability_segmentation),
    ):
        files[what] = tmp_path / f"{what}.dcm"
        FORMATS["dicom"].write(make(case), files[what])
    dataset = pydicom.dcmread(files["seg"])
    assert np.array_equal(dataset.pixel_array.astype(bool), case.result.fused.mask.array)
    read_by_highdicom(case, files["seg"], files["sr"])
    for group in dataset.PerFrameFunctionalGroupsSequence:
        for item in group.DerivationImageSequence[0].SourceImageSequence:
            source = stored[item.ReferencedSOPInstanceUID]
            assert item.ReferencedSOPClassUID == source.SOPClassUID
            assert dataset.StudyInstanceUID == source.StudyInstanceUID
    assert [error for path in files.values() for error in dciodvfy(path)] == []


def everything(case: SegmentedCase) -> list[bytes]:
    return [
        written(make(case))
        for make in (
            build_mask_segmentation,
            build_measurement_report,
            build_secondary_capture,
            build_probability_segmentation,
        )
    ]


def test_a_rerun_gives_the_same_objects_and_other_weights_give_others(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "in", b=1000)
    write_series(WEIGHTED, tmp_path / "elsewhere" / "deeper", b=1000)
    first = everything(segmented(read_image(tmp_path / "in", DWI)))
    moved = segmented(read_image(tmp_path / "elsewhere", DWI))
    renamed = replace(
        moved, raw=replace(moved.raw, name="x"), result=replace(moved.result, case=replace(moved.result.case, name="x"))
    )
    assert everything(renamed) == first
    image = read_image(tmp_path / "in", DWI)
    others = [
        segmented(image, weights={"one": {"fold_0.pth": "c" * 64}}),
        segmented(image, seed=1),
        replace(segmented(image), ensemble=replace(segmented(image).ensemble, config=RunConfig(tta="none"))),
    ]
    uids = [build_mask_segmentation(case).SOPInstanceUID for case in (segmented(image), *others)]
    assert len(set(uids)) == len(uids)


def test_objects_join_the_study_and_take_nothing_private_with_them(tmp_path: Path) -> None:
    def of_a_patient(dataset: Dataset, z: int) -> None:
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID, dataset.PatientSex = "Müller^Jürgen", "0815", "männlich"
        dataset.PatientBirthDate, dataset.StudyDate, dataset.StudyTime = "19560102", "20260301", "not a time"
        dataset.AccessionNumber, dataset.StudyDescription, dataset.PatientAge = "A1", "Schädel", "70 years"
        dataset.FrameOfReferenceUID = "1.2.3.9"
        dataset.private_block(0x11, "SOMEBODY", create=True).add_new(1, "LO", "SECRET TEXT")
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "113100", "DCM", "Basic"
        item.private_block(0x13, "SOMEBODY", create=True).add_new(1, "LO", "SECRET TEXT")
        dataset.DeidentificationMethodCodeSequence = Items([item])

    write_series(WEIGHTED, tmp_path, b=1000, change=of_a_patient)
    case = segmented(read_image(tmp_path, DWI))
    made = [
        make(case)
        for make in (
            build_mask_segmentation,
            build_measurement_report,
            build_secondary_capture,
            build_probability_segmentation,
        )
    ]
    for dataset in map(read_back, made):
        told = {
            key: str(dataset[key].value)
            for key in ("PatientName", "PatientID", "PatientSex", "StudyTime", "PatientAge")
        }
        assert told == {
            "PatientName": "Müller^Jürgen",
            "PatientID": "0815",
            "PatientSex": "",
            "StudyTime": "",
            "PatientAge": "",
        }
        assert (dataset.StudyInstanceUID, dataset.AccessionNumber, dataset.StudyDescription) == (
            "1.2.3",
            "A1",
            "Schädel",
        )
        assert "research only" in dataset.SeriesDescription
    content = b"".join(map(written, made))
    assert b"SECRET" not in content
    assert b"SOMEBODY" not in content
    assert b"Doe" not in content, "nor the name of the folder"
    assert {dataset.get("FrameOfReferenceUID", "1.2.3.9") for dataset in made} == {"1.2.3.9"}
    assert len({dataset.SeriesInstanceUID for dataset in made}) == len(made)


def test_oddities_of_patient_and_study_do_not_make_invalid_objects(tmp_path: Path) -> None:
    """Also in implicit files, where an element has its kind by its tag, whatever stands in it."""

    def odd(dataset: Dataset) -> None:
        dataset.add(pydicom.DataElement(0x00101030, "LO", "heavy"))
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = b"M\xfcller", "1", "1956-01-02"
        dataset.StudyDescription, dataset.SpecificCharacterSet = "z" * 100, "NONSENSE"
        dataset.add(pydicom.DataElement(0x00080090, "PN", ["A^B", "C^D"]))
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    for file in write_series(WEIGHTED, tmp_path / "in", b=1000):
        dataset = pydicom.dcmread(file)
        odd(dataset)
        dataset.save_as(file, implicit_vr=True, little_endian=True)
    case = segmented(read_image(tmp_path / "in", DWI))
    require_one_study(case.raw, ExtraOutputs(dicom=True))
    for name, make in (
        ("seg", build_mask_segmentation),
        ("sr", build_measurement_report),
        ("sc", build_secondary_capture),
        ("fraction", build_probability_segmentation),
    ):
        FORMATS["dicom"].write(make(case), tmp_path / f"{name}.dcm")
        dataset = pydicom.dcmread(tmp_path / f"{name}.dcm")
        assert (dataset.PatientID, dataset.PatientBirthDate, dataset.ReferringPhysicianName) == ("1", "", "A^B")
        assert dataset.StudyDescription == "z" * 64
        assert dciodvfy(tmp_path / f"{name}.dcm") == []


@pytest.mark.parametrize("oddity", ["three digits", "uneven"])
def test_geometry_that_is_not_quite_straight_is_kept_as_it_is_told(tmp_path: Path, oddity: str) -> None:
    def change(dataset: Dataset, z: int) -> None:
        if oddity == "three digits":
            dataset.ImageOrientationPatient = [f"{float(cosine):.3f}" for cosine in dataset.ImageOrientationPatient]
        else:
            dataset.ImagePositionPatient = [
                f"{float(mm) + 0.01 * (z * 7 % 3):.4f}" for mm in dataset.ImagePositionPatient
            ]

    files = write_series(WEIGHTED, tmp_path, b=1000, change=change)
    case = segmented(read_image(tmp_path, DWI))
    dataset = build_mask_segmentation(case)
    assert np.array_equal(dataset.pixel_array.astype(bool), case.result.fused.mask.array)
    for file, group in zip(files, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        told = pydicom.dcmread(file)
        assert [float(mm) for mm in group.PlanePositionSequence[0].ImagePositionPatient] == [
            float(mm) for mm in told.ImagePositionPatient
        ]


def test_the_report_names_weights_and_the_segment(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path, b=1000)
    case = segmented(read_image(tmp_path, DWI))
    report, mask = read_back(build_measurement_report(case)), build_mask_segmentation(case)
    content = written(report)
    assert all(told.encode() in content for told in ("a" * 64, "b" * 64, mask.SOPInstanceUID, "isles-ensemble"))
    evidence = {
        item.ReferencedSOPInstanceUID
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert evidence == {*sources(tmp_path), mask.SOPInstanceUID}


def test_the_report_carries_volumes_by_side_and_region(tmp_path: Path) -> None:
    write_series(WEIGHTED, tmp_path / "in", b=1000)
    case = segmented(read_image(tmp_path / "in", DWI))
    ml = {
        name: UncertainQuantity(value, (value, value))
        for name, value in (("left", 3.0), ("right", 1.0), ("brain stem", 0.5))
    }
    left, right, stem = (StructureVolume(name, volume, volume) for name, volume in ml.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "register_case_to_template", lambda case, onto: None)
        findings = find.compute_findings(case.result)
    FORMATS["dicom"].write(build_measurement_report(replace(case, findings=findings)), tmp_path / "without.dcm")
    findings = replace(findings, places=LesionLocations(None, (left, right), (stem,), ()))
    FORMATS["dicom"].write(build_measurement_report(replace(case, findings=findings)), tmp_path / "sr.dcm")
    (group,) = highdicom.sr.srread(tmp_path / "sr.dcm").content.get_volumetric_roi_measurement_groups()
    told = {
        (site.value.meaning, site.laterality.meaning if site.laterality else ""): one.value
        for one in group.get_measurements()
        for site in one.finding_sites
    }
    assert told == {("Brain", "Left"): 3.0, ("Brain", "Right"): 1.0, ("Brain Stem", ""): 0.5}
    (group,) = highdicom.sr.srread(tmp_path / "without.dcm").content.get_volumetric_roi_measurement_groups()
    assert len(group.get_measurements()) == 3
    uids = [pydicom.dcmread(tmp_path / f"{name}.dcm").SOPInstanceUID for name in ("without", "sr")]
    assert uids[0] == build_measurement_report(case).SOPInstanceUID != uids[1], (
        "two different reports must not share a UID"
    )
    assert [error for name in ("sr", "without") for error in dciodvfy(tmp_path / f"{name}.dcm")] == []


def test_no_lesion_is_a_segmentation_of_all_slices_without_one(tmp_path: Path) -> None:
    write_enhanced([(1000, WEIGHTED)], tmp_path / "in" / "a.dcm")
    case = segmented(read_image(tmp_path / "in", DWI), empty=True)
    for name, make in (
        ("seg", build_mask_segmentation),
        ("sr", build_measurement_report),
        ("sc", build_secondary_capture),
        ("fraction", build_probability_segmentation),
    ):
        FORMATS["dicom"].write(make(case), tmp_path / f"{name}.dcm")
        assert dciodvfy(tmp_path / f"{name}.dcm") == []
    frames = pydicom.dcmread(tmp_path / "seg.dcm").pixel_array
    assert frames.shape == WEIGHTED.array.shape
    assert not frames.any()


def raw(image: RawImage, **others: RawImage) -> RawCase:
    return RawCase("x", {DWI: image, **{Modality(name): other for name, other in others.items()}})


def test_images_without_a_study_are_refused_with_that_word(tmp_path: Path) -> None:
    nifti = read_image(write_image(WEIGHTED.array, tmp_path / "dwi.nii.gz", SMALL), DWI)
    for asked in (ExtraOutputs(dicom=True), ExtraOutputs(dicom_probability=True)):
        with pytest.raises(InputRefused, match="belongs to a DICOM study") as refusal:
            require_one_study(raw(nifti), asked)
        assert "(--dicom, --dicom-probability)" in refusal.value.do
    require_one_study(raw(nifti), ExtraOutputs(report=True))


def test_series_that_do_not_say_their_study_or_come_from_two_are_refused(tmp_path: Path) -> None:
    def elsewhere(dataset: Dataset, z: int) -> None:
        dataset.StudyInstanceUID = "1.2.4"

    def nowhere(dataset: Dataset, z: int) -> None:
        del dataset.StudyInstanceUID

    def nobody(dataset: Dataset, z: int) -> None:
        del dataset.SOPInstanceUID

    write_series(WEIGHTED, tmp_path / "dwi", b=1000)
    write_series(WEIGHTED, tmp_path / "adc", description="ADC", change=elsewhere)
    dwi, adc = read_image(tmp_path / "dwi", DWI), read_image(tmp_path / "adc", ADC)
    with pytest.raises(InputRefused, match="several studies") as refusal:
        require_one_study(raw(dwi, adc=adc), ExtraOutputs(dicom=True))
    assert "leave out the DICOM outputs" in refusal.value.do
    for name, change in (("nowhere", nowhere), ("nobody", nobody)):
        write_series(WEIGHTED, tmp_path / name, b=1000, change=change)
        with pytest.raises(InputRefused, match="needs study, series and SOP instance UIDs"):
            require_one_study(raw(read_image(tmp_path / name, DWI)), ExtraOutputs(dicom=True))


def test_a_contract_case_is_refused_before_networks_are_loaded(tmp_path: Path) -> None:
    arrays = phantom_arrays()
    files = {m: write_image(arrays[m], tmp_path / f"{m}.mha") for m in (DWI, ADC)}

    def load() -> object:
        raise AssertionError("networks were loaded")

    with pytest.raises(InputRefused, match="belongs to a DICOM study"):
        execute.run_case(ContractCase(files, {}), tmp_path / "out", load, ExtraOutputs(dicom=True), LogWatcher())  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
