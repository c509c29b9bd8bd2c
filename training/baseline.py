"""A baseline for networks: the best pair of one DWI and one ADC threshold for all cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.metrics import dice
from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, Modality

DWI_ABOVE = np.arange(1.2, 3.01, 0.1)  # times normal tissue
ADC_BELOW = np.arange(0.5, 1.31, 0.05)


@dataclass(frozen=True)
class ThresholdRule:
    """A voxel is lesion if DWI is above, and ADC below, these multiples of normal tissue."""

    dwi_above: float
    adc_below: float

    def __str__(self) -> str:
        return f"best threshold rule (DWI > {self.dwi_above:.1f}, ADC < {self.adc_below:.2f})"

    def mask(self, case: PreparedCase) -> AnyArray:
        """The rule's mask (z, y, x) of a case."""
        dwi, adc = case.tissue_normalized[Modality.DWI].array, case.tissue_normalized[Modality.ADC].array
        return np.asarray((dwi > self.dwi_above) & (adc < self.adc_below) & case.brain.array)


def best_rule(cases: Sequence[tuple[PreparedCase, AnyArray]]) -> ThresholdRule:
    """The rule with the highest mean Dice over these cases and their true masks: chosen on the very cases it is then measured on,
    so no threshold rule does better there.
    """
    rules = [ThresholdRule(float(dwi), float(adc)) for dwi in DWI_ABOVE for adc in ADC_BELOW]
    return max(rules, key=lambda rule: float(np.mean([dice(truth, rule.mask(case)) for case, truth in cases])))
