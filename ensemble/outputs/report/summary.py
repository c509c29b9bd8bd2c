"""The few lines that `run` prints at the end, for a person."""

from __future__ import annotations

from pathlib import Path

from ensemble.metrics import volume_ml
from ensemble.outputs.report.run_report import RESEARCH_USE
from ensemble.pipeline import MemberOutcome, Result
from ensemble.streams import printable


def headline(result: Result) -> str:
    """The case and what was found in it."""
    count = result.lesion_count
    finding = "no lesion found" if count == 0 else f"{count} lesion{'s' * (count > 1)}, {result.lesion_ml:.2f} ml"
    if specks := result.fused.specks:
        finding += f"; {specks} disputed speck{'s' * (specks > 1)} left out"
    return printable(f"{result.case.name}: {finding}")


def summary(result: Result, folder: Path, suffix: str) -> str:
    """Volume, lesions, votes, and where to look."""
    voters, spacing = len(result.fused.voters), result.case.grid.spacing_zyx_mm
    lines = [f"{headline(result)} ({voters} of {len(result.outcomes)} members voted)"]
    lines += [f"  {outcome.member:<12} {_vote(outcome, spacing)}" for outcome in result.outcomes]
    lines += [f"  {what:<12} {folder / name}" for what, name in (("mask", f"mask{suffix}"), ("picture", "overlay.png"))]
    lines += [f"  {what:<12} {folder / name}" for what, name in (("page", "report.html"), ("report", "report.json"))]
    lines.append(RESEARCH_USE)
    return "\n".join(lines)


def _vote(outcome: MemberOutcome, spacing_zyx_mm: tuple[float, float, float]) -> str:
    if outcome.prediction is None:
        return f"{outcome.status}: {outcome.reason}"
    volume = volume_ml(outcome.prediction.mask.array, spacing_zyx_mm)
    remark = f" ({outcome.reason})" if outcome.reason else ""
    return f"{volume:.2f} ml in {outcome.seconds:.1f} s{remark}"
