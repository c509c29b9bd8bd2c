"""The table of outputs of a case: every kind of output is a row of ROLES or MEMBER_ROLES, and is defined nowhere else.

`layouts` define the path of an artifact, `formats` how its payload is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ensemble.config import ExtraOutputs
from ensemble.outputs.formats import FORMATS
from ensemble.outputs.segmented import SegmentedCase as SegmentedCase
from ensemble.types import Modality
from ensemble.volume import Volume

if TYPE_CHECKING:
    from ensemble.families.base import MemberPrediction

Source = TypeVar("Source")


@dataclass(frozen=True)
class OutputRole(Generic[Source]):
    """A kind of output (mask, report, probability ...): its file name, its format, and what it contains."""

    name: str
    """The file's name, unless a layout has a better one. Letters and digits, so that no member's name before it can run into it."""
    format: str
    """A row of FORMATS."""
    option: str
    """The field of ExtraOutputs that requests it; empty if it is always written."""
    payload: Callable[[Source], Any]
    """Returns the content to write; None if there is none."""

    def __post_init__(self) -> None:
        options = {"", *ExtraOutputs.__dataclass_fields__}
        if not re.fullmatch(r"[a-z0-9]+", self.name) or self.format not in FORMATS or self.option not in options:
            raise ValueError(
                f"no role can be called {self.name!r}, written as {self.format!r}, asked for by {self.option!r}"
            )


@dataclass(frozen=True)
class Artifact:
    """One output of one case."""

    role: OutputRole[Any]
    member: str = ""
    """The member it belongs to; empty for outputs of the case."""
    payload: Any = None

    def file_name(self, image_suffix: str) -> str:
        """Return role name and file suffix; images get `image_suffix`."""
        return self.role.name + (FORMATS[self.role.format].suffix or image_suffix)


def _overlay(case: SegmentedCase) -> bytes:
    from ensemble.outputs.report.figure import draw_overlay  # matplotlib takes a second to import

    picture = io.BytesIO()
    draw_overlay(case.result, picture)
    return picture.getvalue()


def _page(case: SegmentedCase) -> str:
    from ensemble.outputs.report.page import render_case_page

    return render_case_page(case.report, case.result, case.findings, case.trust)


def _in_mni(case: SegmentedCase, modality: Modality | None = None) -> Volume | None:
    """Return mask or image in the template's space; None if it does not exist, or the brain could not be registered."""
    from ensemble.findings.mni import resample_image_to_mni, resample_mask_to_mni

    if case.findings is None or (matrix := case.findings.registered.matrix) is None:
        return None
    if not case.findings.registered.holds or (modality is not None and modality not in case.result.case.images):
        return None
    if modality is None:
        return resample_mask_to_mni(case.result.fused.mask, matrix)
    return resample_image_to_mni(case.result.case.images[modality], matrix)


def _segmentation(case: SegmentedCase) -> Any:
    from ensemble.outputs.dicom.segmentation import build_mask_segmentation  # highdicom takes two seconds to import

    return build_mask_segmentation(case)


def _probability(case: SegmentedCase) -> Any:
    from ensemble.outputs.dicom.segmentation import build_probability_segmentation

    return build_probability_segmentation(case)


def _measurements(case: SegmentedCase) -> Any:
    from ensemble.outputs.dicom.measurements import build_measurement_report

    return build_measurement_report(case)


def _picture(case: SegmentedCase) -> Any:
    from ensemble.outputs.dicom.picture import build_secondary_capture

    return build_secondary_capture(case)


MASK: OutputRole[SegmentedCase] = OutputRole("mask", "image", "", lambda case: case.result.fused.mask)
REPORT: OutputRole[SegmentedCase] = OutputRole("report", "json", "report", lambda case: case.report)
PAGE: OutputRole[SegmentedCase] = OutputRole("report", "html", "report", _page)
OVERLAY: OutputRole[SegmentedCase] = OutputRole("overlay", "png", "report", _overlay)
#: Of the case.
ROLES: tuple[OutputRole[SegmentedCase], ...] = (
    MASK,
    OutputRole("probability", "image", "save_probabilities", lambda case: case.result.fused.mean),
    OutputRole("votes", "image", "save_member_masks", lambda case: case.result.fused.votes),
    REPORT,
    PAGE,
    OVERLAY,
    OutputRole("mnimask", "image", "save_mni", _in_mni),
    *(OutputRole(f"mni{modality}", "image", "save_mni", partial(_in_mni, modality=modality)) for modality in Modality),
    OutputRole("segmentation", "dicom", "dicom", _segmentation),
    OutputRole("measurements", "dicom", "dicom", _measurements),
    OutputRole("picture", "dicom", "dicom", _picture),
    OutputRole("probability", "dicom", "dicom_probability", _probability),
)
#: Of each member that voted.
MEMBER_ROLES: tuple[OutputRole[MemberPrediction], ...] = (
    OutputRole("mask", "image", "save_member_masks", lambda prediction: prediction.mask),
    OutputRole("probability", "image", "save_probabilities", lambda prediction: prediction.probability),
)


def all_artifact_kinds(member: str) -> list[Artifact]:
    """Return an artifact without content for every kind of output of a case and of this member; layouts list all possible paths by them."""
    return [*(Artifact(role) for role in ROLES), *(Artifact(role, member) for role in MEMBER_ROLES)]


def case_artifacts(case: SegmentedCase, extras: ExtraOutputs) -> list[Artifact]:
    """Return the outputs of a case: those always written, and those that `extras` ask for."""
    made = [Artifact(role, "", role.payload(case)) for role in _asked(ROLES, extras)]
    wanted = [artifact for artifact in made if artifact.payload is not None]
    predictions = [outcome.prediction for outcome in case.result.outcomes if outcome.prediction is not None]
    for role in _asked(MEMBER_ROLES, extras):
        wanted += [Artifact(role, prediction.member, role.payload(prediction)) for prediction in predictions]
    return wanted


def dicom_object_roles(extras: ExtraOutputs) -> list[OutputRole[SegmentedCase]]:
    """Return the kinds of DICOM objects that `extras` ask for."""
    return [role for role in _asked(ROLES, extras) if role.format == "dicom"]


def dicom_object_artifacts(case: SegmentedCase, extras: ExtraOutputs) -> list[Artifact]:
    """Return the DICOM objects of a case that `extras` ask for."""
    return [Artifact(role, "", role.payload(case)) for role in dicom_object_roles(extras)]


def _asked(roles: Collection[OutputRole[Source]], extras: ExtraOutputs) -> list[OutputRole[Source]]:
    return [role for role in roles if not role.option or getattr(extras, role.option)]
