"""DICOM measurement report (TID 1500, PS3.16): volume, number, largest and location of lesions, referring to the segmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import highdicom
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import SegmentationStorage

from ensemble import __version__
from ensemble.metrics import detected_lesions
from ensemble.outputs.dicom.segmentation import INFARCT, MASK_SERIES
from ensemble.outputs.dicom.study import DicomSource
from ensemble.outputs.report.run_report import TOOL

if TYPE_CHECKING:
    from ensemble.findings.types import Findings
    from ensemble.outputs.segmented import SegmentedCase

SERIES = 9002
_ML = highdicom.sr.CodedConcept("mL", "UCUM", "mL")
_COUNT = highdicom.sr.CodedConcept("246206008", "SCT", "Number of lesions")
#: Where sides and regions of the findings are.
_SITES = {
    "left": highdicom.sr.FindingSite(codes.SCT.Brain, laterality=codes.SCT.Left),
    "right": highdicom.sr.FindingSite(codes.SCT.Brain, laterality=codes.SCT.Right),
    "cerebrum": highdicom.sr.FindingSite(highdicom.sr.CodedConcept("83678007", "SCT", "Cerebrum")),
    "cerebellum": highdicom.sr.FindingSite(codes.SCT.Cerebellum),
    "brain stem": highdicom.sr.FindingSite(codes.SCT.BrainStem),
}
_ONE = highdicom.sr.CodedConcept("1", "UCUM", "no units")


def build_measurement_report(case: SegmentedCase) -> Dataset:
    """Return the DICOM structured report of a case.

    Its measurement group refers to segment 1 of the object that `build_mask_segmentation` returns.
    """
    source = DicomSource(case)
    own = f"measurements {_ml_by_place(case.findings)}"  # without findings, or with others, it is another report
    device = highdicom.sr.DeviceObserverIdentifyingAttributes(
        uid=source.uid("device"), name=TOOL, manufacturer_name=TOOL, model_name=TOOL, serial_number="0"
    )
    context = highdicom.sr.ObservationContext(
        observer_device_context=highdicom.sr.ObserverContext(codes.DCM.Device, device)
    )
    content = highdicom.sr.MeasurementReport(
        observation_context=context,
        procedure_reported=highdicom.sr.CodedConcept("816077007", "SCT", "Magnetic resonance imaging of brain"),
        imaging_measurements=[_group(source)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    dataset = highdicom.sr.Comprehensive3DSR(
        evidence=_evidence(source),
        content=content,
        series_instance_uid=source.uid(f"{own} series"),
        series_number=SERIES,
        sop_instance_uid=source.uid(own),
        instance_number=1,
        manufacturer=TOOL,
        is_complete=True,
        is_final=False,
        series_description="Lesion volume (AI, research only)",
    )
    return source.finish(dataset, "Lesion volume (AI, research only)")


def lesion_measurements(case: SegmentedCase) -> list[highdicom.sr.Measurement]:
    """Return lesion volume, number, largest lesion and locations of a case, each with its code and unit."""
    mask = case.result.fused.mask.array
    voxels, _ = detected_lesions(mask, mask)
    largest = float(voxels.max(initial=0)) * case.result.case.grid.voxel_ml
    volume = codes.SCT.Volume
    return [
        highdicom.sr.Measurement(volume, round(case.result.lesion_ml, 4), _ML),
        highdicom.sr.Measurement(_COUNT, case.result.lesion_count, _ONE),
        highdicom.sr.Measurement(volume, round(largest, 4), _ML, derivation=codes.SCT.Maximum),
        *_by_place(case.findings),
    ]


def _by_place(findings: Findings | None) -> list[highdicom.sr.Measurement]:
    return [
        highdicom.sr.Measurement(codes.SCT.Volume, ml, _ML, finding_sites=[_SITES[name]])
        for name, ml in _ml_by_place(findings).items()
    ]


def _ml_by_place(findings: Findings | None) -> dict[str, float]:
    """Return volumes (ml) by side and region; empty if the brain could not be registered to the template."""
    if findings is None or findings.places is None:
        return {}
    amounts = {amount.name: amount.ml.value for amount in (*findings.places.sides, *findings.places.regions)}
    return {name: round(amounts[name], 4) for name in _SITES if name in amounts}


def _group(source: DicomSource) -> highdicom.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    digests = source.case.ensemble.digests
    weights = [f"weights {name}: {digest}" for name, files in digests.items() for digest in sorted(set(files.values()))]
    # from_segmentation of highdicom 0.28.2 fails on segmentations of one segment
    segment = highdicom.sr.ReferencedSegment(
        sop_class_uid=SegmentationStorage,
        sop_instance_uid=source.uid("segmentation"),
        segment_number=1,
        source_series=highdicom.sr.SourceSeriesForSegmentation(source.frames[0].series),
    )
    return highdicom.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=highdicom.sr.TrackingIdentifier(uid=source.uid("lesion"), identifier="lesion"),
        referenced_segment=segment,
        finding_type=INFARCT,
        finding_category=highdicom.sr.CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        finding_sites=[highdicom.sr.FindingSite(anatomic_location=codes.SCT.Brain)],
        measurements=lesion_measurements(source.case),
        algorithm_id=highdicom.sr.AlgorithmIdentification(name=TOOL, version=__version__, parameters=weights or None),
    )


def _evidence(source: DicomSource) -> list[Dataset]:
    """Return the objects that the report refers to: the DWI's source images, and the segmentation."""
    frames = dict.fromkeys((frame.sop_class, frame.sop_instance, frame.series) for frame in source.frames)
    own = (SegmentationStorage, source.uid("segmentation"), source.uid("segmentation series"))
    evidence = []
    for sop_class, uid, series in (*frames, own):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = sop_class, uid, series
        dataset.StudyInstanceUID = source.attributes.StudyInstanceUID
        dataset.SeriesNumber, dataset.Modality = MASK_SERIES, "MR"
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
            setattr(dataset, keyword, "")
        for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"):
            setattr(dataset, keyword, "")
        evidence.append(dataset)
    return evidence
