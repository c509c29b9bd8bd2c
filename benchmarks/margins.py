"""How far patients lie from the limits of the input checks that rest on the images themselves.

    python -m benchmarks.margins [--simulated 60] [--real ../shared/cases] [--cache DIR]

Prints, over the simulated validation patients (no head or lesion shape of which was trained on) and, apart, over real cases, the least and
the most of each number in `NAMES`, with the limit above or below which a check refuses or remarks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ensemble.prepare import agreement, plausibility, scale, units
from ensemble.prepare.agreement import AdcMove, mutual_information
from ensemble.prepare.case import prepare_raw
from ensemble.prepare.scale import brain_extent_mm, cut_off_share
from ensemble.types import Modality
from training.evaluate import Truth, real_cases, simulated_cases
from training.simulate import SHARED

#: The numbers, and what the checks make of them.
NAMES = {
    "mutual information of DWI and ADC (nats)": f"refused below {agreement._MIN_INFORMATION}",
    "best information with ADC moved or mirrored, in units of that": f"refused above {agreement._BETTER}",
    "best information with ADC mirrored, in units of that": f"refused above {agreement._AS_WELL_MIRRORED} "
    f"where there are less than {agreement._LITTLE_INFORMATION} nats",
    "longest by shortest axis of the brain": f"refused above {scale._MAX_UNEQUAL} where nothing cuts it off",
    "end section by largest": f"cut off above {scale._CUT_SHARE}",
    "share of the brain whose ADC is that of tissue": f"refused below {units.MIN_TISSUE_SHARE}",
    "typical step (log) from slice to slice, DWI": f"refused above {plausibility._VERY_UNEVEN}, noted above {plausibility._UNEVEN}",
    "typical step (log) from slice to slice, ADC": "as for DWI",
    "brightest part of the DWI (99.9th percentile by tissue)": f"noted below {plausibility._FLAT}",
}


def measure(case: Truth) -> tuple[float, ...]:
    """Return the numbers of one case, in the order of NAMES."""
    ready = prepare_raw(case.raw)
    dwi, adc = (ready.images[modality].array for modality in (Modality.DWI, Modality.ADC))
    brain, grid = ready.brain.array, ready.grid
    here, moves = mutual_information(dwi, adc, brain, grid.spacing_zyx_mm)
    elsewhere = [moved for moved in moves if moved.move is not AdcMove.SHIFTED_SLIGHTLY]
    mirrored = max(moved.nats for moved in elsewhere if moved.move is AdcMove.MIRRORED)
    axes = brain_extent_mm(brain, grid)
    diffusion = adc[brain & (adc > 0)] * units.adc_unit_factor(adc, brain)
    return (
        here,
        max(moved.nats for moved in elsewhere) / here,
        mirrored / here,
        max(axes) / min(axes),
        cut_off_share(brain),
        units.tissue_share(diffusion),
        *plausibility.slice_steps(dwi, adc, brain).values(),
        float(np.percentile(dwi[brain], 99.9)) / plausibility.tissue_level(dwi, brain),
    )


def report(what: str, cases: Iterable[Truth]) -> None:
    """Print least and most of each number."""
    numbers = np.array([measure(case) for case in cases])
    print(f"{what}: {len(numbers)} cases")
    for (name, limit), column in zip(NAMES.items(), numbers.T, strict=True):
        print(f"  {name}: {column.min():.3g} to {column.max():.3g} ({limit})")


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
