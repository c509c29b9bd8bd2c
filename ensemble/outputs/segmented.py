"""A case at its end: what outputs are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.pipeline import Ensemble, Result
    from ensemble.readers.base import RawCase


@dataclass(frozen=True)
class Segmented:
    """A case as it was read, what came of it, and by whom."""

    raw: RawCase
    result: Result
    ensemble: Ensemble

    @cached_property
    def report(self) -> dict[str, Any]:
        """What ran and what came of it, ready for JSON."""
        from ensemble.outputs.report.run_report import build_report

        return build_report(self.raw, self.result, self.ensemble)
