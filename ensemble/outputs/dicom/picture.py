"""Secondary Capture (PS3.3 A.8.1) of the overlay, marked "research only"; it shows no name and no path."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import highdicom
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from ensemble.outputs.dicom.study import DicomSource, source_image_items
from ensemble.outputs.report.figure import draw_overlay
from ensemble.outputs.report.run_report import TOOL

if TYPE_CHECKING:
    from ensemble.outputs.segmented import SegmentedCase

SERIES = 9003


def build_secondary_capture(case: SegmentedCase) -> Dataset:
    """Return the picture of the lesions over the DWI (`draw_overlay`) as a DICOM Secondary Capture image, RGB."""
    source = DicomSource(case)
    drawn = io.BytesIO()
    draw_overlay(case.result, drawn, title="Ischemic lesion (AI, research only)")
    with Image.open(drawn) as image:
        pixels = np.asarray(image.convert("RGB"))
    dataset = highdicom.sc.SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=source.attributes.StudyInstanceUID,
        series_instance_uid=source.uid("picture series"),
        series_number=SERIES,
        sop_instance_uid=source.uid("picture"),
        instance_number=1,
        manufacturer=TOOL,
        patient_orientation=("L", "P"),
    )
    dataset.BodyPartExamined, dataset.BurnedInAnnotation = "BRAIN", "NO"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.DerivationDescription = "Slices of DWI and ADC with the outline of the segmentation"
    dataset.SourceImageSequence = source_image_items(source.frames)
    dataset.ImageComments = "For research only. Not a medical device."
    for moment in ("DateOfSecondaryCapture", "TimeOfSecondaryCapture"):  # optional, and another one at each rerun
        del dataset[moment]
    return source.finish(dataset, "Lesion picture (AI, research only)")
