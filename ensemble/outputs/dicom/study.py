"""What all DICOM objects of a case share: patient, study, references to the source images, and equipment.

A rerun on the same images with the same weights gives the same objects, byte for byte: UIDs are digests, and dates are those of the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.valuerep import VR, validate_value

from ensemble import __version__
from ensemble.config import IMMATERIAL, ExtraOutputs
from ensemble.errors import InputRefused
from ensemble.outputs.report.run_report import TOOL
from ensemble.readers.base import RawCase
from ensemble.readers.dicom.study import STUDY_ATTRIBUTES
from ensemble.readers.origin import DicomOrigin, SourceFrame
from ensemble.types import Modality

if TYPE_CHECKING:
    from ensemble.outputs.segmented import SegmentedCase

#: Without these an object can't join a study; all others may be empty.
_NEEDED = ("StudyInstanceUID",)
_REQUIRED = {  # of type 2: there, be they empty
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
}
_SEXES = ("M", "F", "O", "")
#: Value representations with a fixed form: invalid values of a scanner are omitted, since archives reject them.
_IDENTIFYING = {"PatientName", "PatientID", "StudyInstanceUID", "StudyID", "AccessionNumber"}
#: Characters that a text of a kind may have.
_LONGEST = {"LO": 64, "SH": 16, "PN": 64}
_FIXED = {VR.DA, VR.TM, VR.AS, VR.DS, VR.IS, VR.UI, VR.CS}


@dataclass(frozen=True, eq=False)
class DicomSource:
    """A case whose DWI came from DICOM: patient, study and frames that its derived DICOM objects refer to."""

    case: SegmentedCase

    @property
    def origin(self) -> DicomOrigin:
        origin = self.case.raw.images[Modality.DWI].origin
        assert origin is not None, "require_one_study comes first"
        return origin

    @cached_property
    def frames(self) -> list[SourceFrame]:
        """All source images of the DWI, each once, bottom first."""
        return list(dict.fromkeys(frame for held in self.origin.slices for frame in held.frames))

    @cached_property
    def identity(self) -> str:
        """SHA-256 over everything that determines the result, and the result itself, as another processor may round differently."""
        case = self.case
        images = {
            modality.value: [_digest(image.volume.array), repr(image.volume.grid.affine.tolist())]
            for modality, image in case.raw.images.items()
        }
        options = {name: value for name, value in case.ensemble.config.as_json().items() if name not in IMMATERIAL}
        content = {
            "version": __version__,
            "frames": [(frame.sop_instance, frame.number) for frame in self.frames],
            "images": images,
            "weights": {name: dict(digests) for name, digests in case.ensemble.digests.items()},
            "options": options,
            "result": [_digest(case.result.fused.mask.array), _digest(case.result.fused.mean.array)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def uid(self, what: str) -> str:
        """Return the UID of an object, series or other entity of the case (PS3.5 B.2: a UUID as a number)."""
        return digest_uid(f"{self.identity} {what}")

    @cached_property
    def frame_of_reference(self) -> str:
        """The source's frame of reference UID; if de-identification removed it, one derived from its series."""
        told = str(self.origin.study.get("FrameOfReferenceUID", "") or "")
        return told or digest_uid(f"frame of reference {self.frames[0].series}")

    @cached_property
    def attributes(self) -> Dataset:
        """The attributes of patient and study, in Unicode and valid for their value representation."""
        kept = Dataset()
        for keyword in STUDY_ATTRIBUTES:
            if keyword in self.origin.study:
                setattr(kept, keyword, _well_formed(keyword, self.origin.study[keyword].value))
            elif keyword in _REQUIRED:
                setattr(kept, keyword, "")
        return kept

    def finish(self, dataset: Dataset, description: str) -> Dataset:
        """Set the attributes that all objects share: patient, study, acquisition time and equipment."""
        for keyword in STUDY_ATTRIBUTES:
            if keyword in dataset:
                del dataset[keyword]
        dataset.update(self.attributes)
        date, time = self._when()
        for kind in ("InstanceCreation", "Content", "Series"):
            if f"{kind}Date" in dataset or kind == "Series":
                setattr(dataset, f"{kind}Date", date)
                setattr(dataset, f"{kind}Time", time)
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.SeriesDescription = description
        dataset.Manufacturer = dataset.ManufacturerModelName = TOOL
        dataset.SoftwareVersions, dataset.DeviceSerialNumber = __version__, "0"
        dataset.pop("ContributingEquipmentSequence", None)  # highdicom's, with the time of this run
        dataset.remove_private_tags()
        return dataset

    def _when(self) -> tuple[str, str]:
        """Return when the DWI was acquired, according to its file."""
        study = self.origin.study
        for kind in ("Content", "Acquisition", "Series", "Study"):
            date, time = (str(study.get(f"{kind}{part}", "") or "") for part in ("Date", "Time"))
            if _is_valid("DA", date) and date:
                return date, time if time and _is_valid("TM", time) else "000000"
        return "19000101", "000000"


def require_one_study(raw: RawCase, extras: ExtraOutputs) -> None:
    """Raise InputRefused if DICOM outputs are requested but the images do not come from exactly one DICOM study."""
    if not (extras.dicom or extras.dicom_probability):
        return
    dwi = raw.images[Modality.DWI]
    without = "leave out the DICOM outputs (--dicom, --dicom-probability)"
    if dwi.origin is None:
        raise InputRefused(
            "DICOM output needs a DWI that belongs to a DICOM study",
            where=dwi.path,
            found="an image file (NIfTI, MetaImage, NRRD), or DICOM files that no longer exist",
            do=f"give the DWI as a folder or .zip of DICOM, or {without}",
        )
    lacking = [keyword for keyword in _NEEDED if not dwi.origin.study.get(keyword)]
    if lacking or not all(frame.sop_instance and frame.series for held in dwi.origin.slices for frame in held.frames):
        raise InputRefused(
            "DICOM output needs study, series and SOP instance UIDs, which the DWI's files lack",
            where=dwi.path,
            found=f"no {', '.join(lacking) or 'SOP instance or series UID'}",
            do=f"export the series again, or {without}",
        )
    studies = {
        str(image.origin.study.get("StudyInstanceUID", "")): modality.label
        for modality, image in raw.images.items()
        if image.origin is not None
    }
    if len(studies) > 1:
        raise InputRefused(
            "DICOM output needs images of one study, but these come from several studies",
            where=dwi.path,
            found="; ".join(f"{label}: study {uid}" for uid, label in studies.items()),
            do=f"give the series of one examination, or {without}",
        )


def digest_uid(text: str) -> str:
    """Return a UID derived from the SHA-256 of a text (PS3.5 B.2: a UUID as a number)."""
    return f"2.25.{int(hashlib.sha256(text.encode()).hexdigest()[:32], 16)}"


def referenced_series_items(frames: Iterable[SourceFrame]) -> Items:
    """Return the items of a ReferencedSeriesSequence (PS3.3 C.12.1.2): every instance once, by series."""
    by_series: dict[str, dict[str, str]] = {}
    for frame in frames:
        by_series.setdefault(frame.series, {})[frame.sop_instance] = frame.sop_class
    items = []
    for series, instances in by_series.items():
        item = Dataset()
        item.SeriesInstanceUID = series
        item.ReferencedInstanceSequence = Items([_reference(sop_class, uid) for uid, sop_class in instances.items()])
        items.append(item)
    return Items(items)


def source_image_items(frames: Iterable[SourceFrame]) -> Items:
    """Return the items of a SourceImageSequence (PS3.3 C.7.6.16.2.6): every instance once, with its frame numbers."""
    by_instance: dict[tuple[str, str], list[int]] = {}
    for frame in frames:
        by_instance.setdefault((frame.sop_class, frame.sop_instance), []).extend(
            [] if frame.number is None else [frame.number]
        )
    items = []
    for (sop_class, uid), numbers in by_instance.items():
        item = _reference(sop_class, uid)
        if numbers:
            item.ReferencedFrameNumber = sorted(numbers)
        item.PurposeOfReferenceCodeSequence = Items(
            [code_item("121322", "DCM", "Source image for image processing operation")]
        )
        items.append(item)
    return Items(items)


def code_item(value: str, scheme: str, meaning: str) -> Dataset:
    """Return an item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _reference(sop_class: str, uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    return item


def _digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _well_formed(keyword: str, value: Any) -> Any:
    """Return a valid attribute value: empty if the source's is of the wrong kind, shortened if too long, the first of several.

    What an archive knows a patient and a study by stays as it is.
    """
    vr = dictionary_VR(keyword)
    if vr == "SQ":
        return Items([item for item in value if _is_whole(item)] if isinstance(value, Items) else [])
    several = (list(value) or [""]) if isinstance(value, pydicom.multival.MultiValue) else [value]
    if vr == "PN":
        several = [str(name or "") for name in several]
    if keyword not in _IDENTIFYING:
        if vr in _FIXED and not all(_is_valid(vr, str(one)) for one in several if one not in (None, "")):
            return ""
        if keyword == "PatientSex" and several[0] not in _SEXES:
            return ""
        several = several[:1] if dictionary_VM(keyword) == "1" else several
        several = [one[: _LONGEST.get(vr, len(one))] if isinstance(one, str) else one for one in several]
    return several if len(several) > 1 else several[0]


def _is_valid(vr: str, text: str) -> bool:
    try:
        validate_value(vr, text, pydicom.config.RAISE)
    except ValueError:
        return False
    return True


def _is_whole(item: Dataset) -> bool:
    item.remove_private_tags()
    return len(item) > 0
