"""DICOM Segmentation (PS3.3 A.51): the mask (binary) and the mean probability (fractional), one frame per DWI slice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import highdicom
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from ensemble import __version__
from ensemble.outputs.dicom.study import DicomSource, referenced_series_items, source_image_items
from ensemble.outputs.report.run_report import TOOL
from ensemble.types import AnyArray

if TYPE_CHECKING:
    from ensemble.outputs.segmented import SegmentedCase

#: Category and type of the segment (CID 7150, 7198), SNOMED CT.
ABNORMAL = highdicom.sr.CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")
INFARCT = highdicom.sr.CodedConcept("55641003", "SCT", "Infarct")
MASK_SERIES, PROBABILITY_SERIES = 9001, 9004


def build_mask_segmentation(case: SegmentedCase) -> Dataset:
    """Return the mask as a binary segmentation with one segment."""
    source = DicomSource(case)
    return _segmentation(source, case.result.fused.mask.array.astype(np.uint8), "segmentation", MASK_SERIES)


def build_probability_segmentation(case: SegmentedCase) -> Dataset:
    """Return the voters' mean lesion probability as a fractional segmentation, in steps of 1/255."""
    source = DicomSource(case)
    mean = np.clip(case.result.fused.mean.array.astype(np.float32), 0.0, 1.0)
    return _segmentation(source, mean, "probability", PROBABILITY_SERIES)


def _segmentation(source: DicomSource, array: AnyArray, what: str, number: int) -> Dataset:
    fractional = array.dtype.kind == "f"
    kinds = highdicom.seg.SegmentationTypeValues
    dataset = highdicom.seg.Segmentation(
        source_images=_slices(source),
        pixel_array=array,
        segmentation_type=kinds.FRACTIONAL if fractional else kinds.BINARY,
        segment_descriptions=[_segment(source)],
        series_instance_uid=source.uid(f"{what} series"),
        series_number=number,
        sop_instance_uid=source.uid(what),
        instance_number=1,
        manufacturer=TOOL,
        manufacturer_model_name=TOOL,
        software_versions=__version__,
        device_serial_number="0",
        content_label="PROBABILITY" if fractional else "LESION",
        content_description="Ischemic lesion, research only",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=False,
    )
    _refer(dataset, source)
    dataset.DimensionOrganizationSequence[0].DimensionOrganizationUID = source.uid(f"{what} dimensions")
    for index in dataset.DimensionIndexSequence:
        index.DimensionOrganizationUID = source.uid(f"{what} dimensions")
    described = "Lesion probability (AI, research only)" if fractional else "Ischemic lesion (AI, research only)"
    return source.finish(dataset, described)


def _segment(source: DicomSource) -> highdicom.seg.SegmentDescription:
    return highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Ischemic lesion",
        segmented_property_category=ABNORMAL,
        segmented_property_type=INFARCT,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm_identification(source),
        tracking_uid=source.uid("lesion"),
        tracking_id="lesion",
        anatomic_regions=[codes.SCT.Brain],
    )


def algorithm_identification(source: DicomSource) -> highdicom.AlgorithmIdentificationSequence:
    """Return the algorithm identification: name, version and weights (PS3.3 10.16)."""
    return highdicom.AlgorithmIdentificationSequence(
        name=TOOL, version=__version__, family=codes.DCM.ArtificialIntelligence, parameters=_parameters(source)
    )


def _parameters(source: DicomSource) -> dict[str, str]:
    digests = source.case.ensemble.digests
    return {f"weights {name}": " ".join(sorted(set(files.values()))) for name, files in digests.items()}


def _slices(source: DicomSource) -> list[Dataset]:
    """Return each DWI slice as a single-frame MR image, from which highdicom takes the geometry.

    Their UIDs end in the numbers of slices, for which `_refer` puts what holds them.
    """
    origin, grid = source.origin, source.case.result.case.grid
    images = []
    for z, held in enumerate(origin.slices):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, _stand_in(z)
        image.StudyInstanceUID, image.SeriesInstanceUID = source.attributes.StudyInstanceUID, "2.25.1"
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
            setattr(image, keyword, "")
        for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(image, keyword, "")
        image.Modality, image.FrameOfReferenceUID = "MR", source.frame_of_reference
        if told := source.origin.study.get("PositionReferenceIndicator"):
            image.PositionReferenceIndicator = told
        image.Columns, image.Rows, _ = grid.size
        image.ImagePositionPatient = [_decimal(mm) for mm in held.position]
        image.ImageOrientationPatient = [_decimal(cosine) for cosine in origin.orientation]
        image.PixelSpacing = [_decimal(mm) for mm in origin.spacing]
        image.SliceThickness = image.SpacingBetweenSlices = _decimal(grid.spacing_mm[2])
        images.append(image)
    return images


def _refer(dataset: Dataset, source: DicomSource) -> None:
    """Put the frames in slice order, and make the object and each frame refer to their source images."""
    groups = dataset.PerFrameFunctionalGroupsSequence
    order = [
        int(_only(_only(group.DerivationImageSequence).SourceImageSequence).ReferencedSOPInstanceUID.rpartition(".")[2])
        for group in groups
    ]
    frames = dataset.pixel_array.reshape(len(groups), -1)[np.argsort(order)]
    binary = dataset.BitsAllocated == 1
    dataset.PixelData = pack_bits(frames.ravel(), pad=True) if binary else frames.tobytes()
    dataset.PerFrameFunctionalGroupsSequence = Items([groups[int(at)] for at in np.argsort(order)])
    slices_in = Counter(frame.sop_instance for held in source.origin.slices for frame in held.frames)
    for z, (group, held) in enumerate(zip(dataset.PerFrameFunctionalGroupsSequence, source.origin.slices, strict=True)):
        group.FrameContentSequence[0].DimensionIndexValues = [1, z + 1]
        derivation = _only(group.DerivationImageSequence)
        derivation.SourceImageSequence = source_image_items(held.frames)
        for item in derivation.SourceImageSequence:
            if slices_in[item.ReferencedSOPInstanceUID] == 1 or "ReferencedFrameNumber" in item:
                item.SpatialLocationsPreserved = (
                    "YES"  # not for mosaics and tiles, whose headers give the position of the whole image
                )
    dataset.ReferencedSeriesSequence = referenced_series_items(source.frames)
    for keyword in ("SourceImageSequence", "StudiesContainingOtherReferencedInstancesSequence"):
        if keyword in dataset:
            del dataset[keyword]


def _only(items: Items) -> Dataset:
    (item,) = items
    return item


def _stand_in(z: int) -> str:
    return f"2.25.1.{z + 1}"


def _decimal(number: float) -> str:
    """Return a number as a decimal string of at most 16 characters (PS3.5 6.2)."""
    return next(text for digits in range(16, 4, -1) if len(text := f"{float(number):.{digits}g}") <= 16)
