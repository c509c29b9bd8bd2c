"""How far patients lie from the limits of two checks: that ADC belongs to its DWI, and that a brain has a brain's shape.

    python -m benchmarks.margins [--simulated 60] [--real ../shared/cases] [--cache DIR]

Prints, over the simulated validation patients (no head or lesion shape of which was trained on) and, apart, over real cases, the least and
the most of: mutual information of DWI and ADC; the best information with ADC mirrored or moved, in units of that (refused above 1.2);
longest axis of the brain in units of the shortest (refused above 2.1 where nothing cuts it off); and its largest end section as a share of
the largest one (above 0.25 it counts as cut off).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ensemble.prepare.agreement import AdcMove, mutual_information
from ensemble.prepare.case import prepare_raw
from ensemble.prepare.scale import brain_extent_mm, cut_off_share
from ensemble.types import Modality
from training.evaluate import Truth, real_cases, simulated_cases
from training.simulate import SHARED

NAMES = ("information (nats)", "best elsewhere, times that", "longest by shortest axis", "end section by largest")


def measure(case: Truth) -> tuple[float, ...]:
    """The four numbers of one case, in the order of NAMES."""
    ready = prepare_raw(case.raw)
    dwi, adc, brain, grid = ready.images[Modality.DWI], ready.images[Modality.ADC], ready.brain.array, ready.grid
    here, elsewhere = mutual_information(dwi.array, adc.array, brain, grid.spacing_zyx_mm)
    axes = brain_extent_mm(brain, grid)
    best = max(moved.nats for moved in elsewhere if moved.move is not AdcMove.SHIFTED_SLIGHTLY)
    return here, best / here, max(axes) / min(axes), cut_off_share(brain)


def report(what: str, cases: Iterable[Truth]) -> None:
    """Print least and most of each number."""
    numbers = np.array([measure(case) for case in cases])
    print(f"{what}: {len(numbers)} cases")
    for name, column in zip(NAMES, numbers.T, strict=True):
        print(f"  {name}: {column.min():.3g} to {column.max():.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", type=int, default=60)
    parser.add_argument("--real", type=Path, help="folder of real cases")
    parser.add_argument("--cache", type=Path, help="folder in which simulated cases are kept between calls")
    parser.add_argument("--shared", type=Path, default=SHARED)
    options = parser.parse_args()
    report("simulated", simulated_cases(options.simulated, options.shared, options.cache))
    if options.real:
        report("real", real_cases(options.real))


if __name__ == "__main__":
    main()
