"""The summary that `run` prints at the end."""

from __future__ import annotations

from pathlib import Path

from ensemble.config import ExtraOutputs
from ensemble.metrics import volume_ml
from ensemble.outputs.artifacts import MASK, OVERLAY, PAGE, REPORT, Artifact, SegmentedCase, dicom_object_roles
from ensemble.outputs.layouts.folder import FolderLayout
from ensemble.outputs.report.findings_text import describe_findings
from ensemble.outputs.report.run_report import RESEARCH_USE
from ensemble.outputs.report.views import case_headline
from ensemble.pipeline import MemberOutcome
from ensemble.text import escape_invisible


def closing_lines(case: SegmentedCase, extras: ExtraOutputs, folder: Path, suffix: str) -> str:
    """Return the lines that close a run: lesion volume and number, votes, locations, and the main files in the output folder."""
    result, layout = case.result, FolderLayout(suffix)
    voters, spacing = len(result.fused.voters), result.case.grid.spacing_zyx_mm
    lines = [f"{case_headline(result)} ({voters} of {len(result.outcomes)} members voted)"]
    lines += [f"  {outcome.member:<12} {_vote(outcome, spacing)}" for outcome in result.outcomes]
    if case.trust is not None:
        lines.append(f"  {'trust':<12} {case.trust.text}")
    if case.findings is not None:
        lines.append(f"  {'findings':<12} {'; '.join(describe_findings(case.findings))}")
    for what, role in (("mask", MASK), ("picture", OVERLAY), ("page", PAGE), ("report", REPORT)):
        lines.append(f"  {what:<12} {folder / layout.place(Artifact(role))}")
    if objects := [layout.place(Artifact(role)) for role in dicom_object_roles(extras)]:
        lines.append(f"  {'objects':<12} {', '.join(objects)}")
    lines.append(RESEARCH_USE)
    return "\n".join(map(escape_invisible, lines))


def _vote(outcome: MemberOutcome, spacing_zyx_mm: tuple[float, float, float]) -> str:
    if outcome.prediction is None:
        return f"{outcome.status}: {outcome.reason}"
    volume = volume_ml(outcome.prediction.mask.array, spacing_zyx_mm)
    remark = f" ({outcome.reason})" if outcome.reason else ""
    return f"{volume:.2f} ml in {outcome.seconds:.1f} s{remark}"
