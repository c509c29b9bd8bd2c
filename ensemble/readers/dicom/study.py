"""What a series says of its patient and study, as objects that join the study must repeat it (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2)."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from ensemble.files import open_file

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


def read_study(path: Path) -> Dataset:
    """Attributes of patient, study and series of a file that has been read before, in Unicode, without private ones. Raises OSError."""
    with open_file(path) as file:
        dataset = pydicom.dcmread(
            file, stop_before_pixels=True, force=True, specific_tags=[*STUDY_ATTRIBUTES, *_SERIES, *_WHEN]
        )
    dataset.decode()
    study = Dataset()
    for element in dataset:
        if not element.tag.is_private and element.keyword in {*STUDY_ATTRIBUTES, *_SERIES, *_WHEN}:
            study.add(deepcopy(element))
    study.remove_private_tags()
    return study
