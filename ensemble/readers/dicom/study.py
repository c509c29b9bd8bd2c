"""Attributes of patient and study that objects joining the study must repeat (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2)."""

from __future__ import annotations

import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pydicom
from pydicom.charset import decode_element
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from ensemble.files import open_file
from ensemble.readers.dicom.facts import MALFORMED, texts_of

_PATIENT = (
    *(
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "TypeOfPatientID",
        "PatientBirthDate",
        "PatientBirthTime",
        "PatientSex",
    ),
    *("OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames", "EthnicGroup", "PatientComments"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
)
_STUDY = (
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber"),
    *(
        "IssuerOfAccessionNumberSequence",
        "ReferringPhysicianName",
        "PhysiciansOfRecord",
        "NameOfPhysiciansReadingStudy",
    ),
    *(
        "PatientAge",
        "PatientSize",
        "PatientWeight",
        "AdmittingDiagnosesDescription",
        "AdditionalPatientHistory",
        "Occupation",
    ),
)
_SERIES = (
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "SeriesNumber",
    "SeriesDate",
    "SeriesTime",
    "SpecificCharacterSet",
)
_WHEN = ("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "ContentDate", "ContentTime")
STUDY_ATTRIBUTES = (*_PATIENT, *_STUDY)


def read_study_attributes(path: Path) -> Dataset:
    """Read the attributes of patient, study and series of a file, in Unicode, without private ones.

    What makes no sense is omitted. Raises one of MALFORMED where the file can't be read any more.
    """
    tags = (tag_for_keyword(keyword) for keyword in (*STUDY_ATTRIBUTES, *_SERIES, *_WHEN))
    wanted = [tag for tag in tags if tag is not None]
    with open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities in attributes
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=wanted)
        study = Dataset()
        encoding = texts_of(dataset, "SpecificCharacterSet") or ("ISO_IR 6",)
        for tag in [tag for tag in dataset.keys() if tag in wanted]:  # noqa: SIM118 (iterating converts all)
            with suppress(*MALFORMED):
                element = deepcopy(dataset[tag])
                decode_element(element, list(encoding))
                study.add(element)
    study.remove_private_tags()
    return study
