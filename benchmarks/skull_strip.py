"""Is a skull told from a brain that is stripped already, what is taken for the brain, and how long does that take?

    python -m benchmarks.skull_strip [--heads 32] [--shared ../shared]

Simulated heads (`benchmarks.unweighted`: b-values, noise, grids, fat and air of many kinds) are shown whole, stripped, and with the skull
left on a quarter or half of the circumference. For each: whether `--skull-strip auto` strips it, how much of the brain HD-BET alone would
keep, and how much `--skull-strip always` keeps. Then the same of the volunteers' heads and of the released cases, whose brain is not known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy import ndimage

from benchmarks.memory import peak_mb
from benchmarks.trust import remember_brains
from benchmarks.unweighted import FIRST_SEED, scan
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.metrics import dice, volume_ml
from ensemble.prepare import skull
from ensemble.prepare.brain import brain_mask
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume
from training.bank import anterior_grid
from training.corruptions import sector_of
from training.evaluate import lesion_free_heads, real_cases
from training.simulate import SHARED

#: What is shown: the share of the circumference on which the skull is left, and how far out (mm); None of a whole head.
STATES: dict[str, tuple[float, float] | None] = {
    "whole head": None,
    "stripped": (0.0, 0.0),
    "skull left on a quarter": (0.25, 15.0),
    "skull left on a half": (0.5, 12.0),
}
#: CPU seconds of each call of HD-BET.
HDBET_SECONDS: list[float] = []


def simulated_heads(number: int, shared: Path) -> Iterator[tuple[str, Volume, BoolArray]]:
    """Yield name, DWI and true brain of heads with a skull."""
    with_skull = [seed for seed in range(FIRST_SEED, FIRST_SEED + 2 * number) if seed % 3]
    for seed in with_skull[:number]:
        one = scan(seed, shared)
        grid = anterior_grid(one.adc.shape, one.spacing_zyx_mm)
        yield str(seed), Volume(one.images["dwi"].astype(np.float32), grid), one.brain


def partly_stripped(dwi: Volume, brain: BoolArray, share: float, rim_mm: float, angle: float) -> Volume:
    """Return the image with all removed but the brain and, on a share of the circumference, what is near it."""
    distance = ndimage.distance_transform_edt(~brain, dwi.grid.spacing_zyx_mm)
    left = (distance < rim_mm) & sector_of(brain.shape, angle, share)
    return dwi.like(np.where(brain | left, dwi.array, 0))


def measured(dwi: Volume, brain: BoolArray | None, device: str) -> dict[str, object]:
    """Strip an image; return what HD-BET finds of the brain, and the product."""
    stripped, _ = skull.must_strip("auto", dwi)
    started = time.process_time()
    alone = skull._brain_probability(dwi, device)
    if (seconds := time.process_time() - started) > 1:  # else it was kept from an earlier call
        HDBET_SECONDS.append(seconds)
    told: dict[str, object] = {"auto": stripped, "hdbet_ml": volume_ml(alone, dwi.grid.spacing_zyx_mm)}
    with patch.object(skull, "_brain_probability", lambda *_: alone):
        try:
            found, by_hdbet, _ = skull.strip_skull(dwi, device, Path("dwi"), RunConfig.brain_ml)
        except InputRefused as refused:
            return told | {"refused": refused.what}
    told |= {"ml": volume_ml(found, dwi.grid.spacing_zyx_mm), "by_hdbet": by_hdbet}
    if brain is not None:
        told |= {"hdbet_kept": kept(alone, brain), "kept": kept(found, brain), "dice": dice(brain, found)}
    return told


def kept(found: BoolArray, brain: BoolArray) -> float:
    """Return the share of the brain that was found."""
    return float((found & brain).sum() / brain.sum())


def table(rows: dict[str, list[dict[str, object]]]) -> list[str]:
    """Return a row per state: lowest and median share of the brain that is kept."""
    lines = [
        "| shown | heads | stripped by auto | brain kept by HD-BET alone: lowest, median | by us | our Dice | refused |",
        "| --- | ---: | ---: | --- | --- | --- | ---: |",
    ]
    for state, here in rows.items():
        done = [row for row in here if "refused" not in row]
        pairs = (
            f"{np.min(values):.2f}, {np.median(values):.2f}" if (values := [float(str(r[name])) for r in done]) else "-"
            for name in ("hdbet_kept", "kept", "dice")
        )
        autos = sum(bool(row["auto"]) for row in here)
        lines.append(f"| {state} | {len(here)} | {autos} | {' | '.join(pairs)} | {len(here) - len(done)} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.skull_strip", description="is a skull told, and the brain kept?"
    )
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder with anatomy/, lesions/, cases/ and normals/"
    )
    parser.add_argument("--heads", type=int, default=32, help="simulated ones (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(".train/skull"),
        help="where HD-BET's brains are kept (default: %(default)s)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    remember_brains(options.folder)
    rows: dict[str, list[dict[str, object]]] = {state: [] for state in STATES}
    for number, (name, dwi, brain) in enumerate(simulated_heads(options.heads, options.shared)):
        for state, left in STATES.items():
            shown = dwi if left is None else partly_stripped(dwi, brain, *left, angle=number)
            rows[state].append(measured(shown, brain, options.device))
        print(f"{name} done", file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    for case in (*lesion_free_heads(options.shared / "normals"), *real_cases(options.shared / "cases")):
        name, dwi = case.raw.name, case.raw.images[Modality.DWI].volume
        told = measured(dwi, None, options.device)
        auto = "stripped by auto" if told["auto"] else "left alone by auto"
        found = told.get("refused") or f"{told['ml']:.0f} ml {'by HD-BET' if told['by_hdbet'] else 'by brightness'}"
        shown_ml = volume_ml(brain_mask(dwi.array, dwi.array), dwi.grid.spacing_zyx_mm)
        print(f"{name}: {auto}; always: {found}; HD-BET {told['hdbet_ml']:.0f} ml, foreground {shown_ml:.0f} ml")
    if HDBET_SECONDS:
        print(
            f"HD-BET: {np.median(HDBET_SECONDS):.0f} CPU s (median of {len(HDBET_SECONDS)}), peak memory {peak_mb() / 1024:.1f} GB"
        )


if __name__ == "__main__":
    main()
