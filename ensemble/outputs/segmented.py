"""A segmented case, from which all outputs are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ensemble.text import replace_undecodable_in_json

if TYPE_CHECKING:
    from ensemble.config import ExtraOutputs
    from ensemble.findings.types import Findings
    from ensemble.pipeline import Ensemble, Result
    from ensemble.readers.base import RawCase
    from ensemble.trust.judge import Trust


@dataclass(frozen=True)
class SegmentedCase:
    """A case as read, its result, and the ensemble that made it."""

    raw: RawCase
    result: Result
    ensemble: Ensemble
    findings: Findings | None = None
    """The location of the lesions; None if findings are off."""
    examination: Mapping[str, Any] | None = None
    """What the examination held that its images were chosen from, where a whole one was given."""
    trust: Trust | None = None
    """How far the mask can be trusted; None if trust is off."""

    @classmethod
    def of(
        cls,
        raw: RawCase,
        result: Result,
        ensemble: Ensemble,
        extras: ExtraOutputs,
        examination: Mapping[str, Any] | None = None,
    ) -> SegmentedCase:
        """Make a segmented case, with findings if `extras` ask for them, and trust if the ensemble's options do."""
        from ensemble.trust.judge import judge

        trust = judge(result, ensemble) if ensemble.config.trust else None
        if not extras.findings:
            return cls(raw, result, ensemble, None, examination, trust)
        from ensemble.findings.find import compute_findings
        from ensemble.findings.maps import read_label_maps

        found = compute_findings(result, read_label_maps(extras.atlas) if extras.atlas else ())
        return cls(raw, result, ensemble, found, examination, trust)

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of `report.json`."""
        from ensemble.outputs.report.run_report import build_report

        report = build_report(self.raw, self.result, self.ensemble, self.findings, self.trust)
        return (
            report
            if self.examination is None
            else report | {"examination": replace_undecodable_in_json(self.examination)}
        )
