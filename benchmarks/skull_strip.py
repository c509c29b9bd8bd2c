"""Does `--skull-strip auto` strip a head, leave extracted brains alone, and how long does that take?

    python -m benchmarks.skull_strip [--shared ../shared] [--case isles22_0009]

The head is a released case with a synthetic skull around its brain (test/heads.py): CSF, bone, fat-suppressed scalp, noisy air. Prints
wall and CPU seconds, and the Dice of HD-BET's mask with the released extraction. The other released cases must be left alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

from benchmarks.memory import peak_mb
from ensemble.config import RunConfig
from ensemble.metrics import dice
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.skull import must_strip, strip_skull
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality
from heads import with_skull

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def main() -> None:
    parser = argparse.ArgumentParser(description="skull stripping: told apart, done, timed")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with cases/")
    parser.add_argument("--case", default="isles22_0009", help="which case gets a skull")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for folder in sorted(path for path in (options.shared / "cases").iterdir() if path.is_dir()):
        files = {m: next(folder.glob(f"{m}.[nm]*")) for m in (Modality.DWI, Modality.ADC)}
        raw = read_case_files(folder.name, files)
        dwi, adc = (raw.images[m].volume for m in (Modality.DWI, Modality.ADC))
        started = time.process_time()
        stripped, _ = must_strip("auto", dwi)
        print(
            f"{folder.name}, as released: {'STRIPPED' if stripped else 'left alone'} ({time.process_time() - started:.2f} CPU s)"
        )
        if folder.name == options.case:
            brain = brain_mask(dwi.array, adc.array)
            head_dwi = dwi.like(with_skull(dwi.array, adc.array, brain, dwi.grid.spacing_zyx_mm)[0])
            stripped, notes = must_strip("auto", head_dwi)
            print(
                f"{folder.name}, with a skull: {'stripped' if stripped else 'LEFT ALONE'}: {[note.text for note in notes]}",
                flush=True,
            )
            wall, cpu = time.perf_counter(), time.process_time()
            found, note = strip_skull(head_dwi, options.device, folder, RunConfig.brain_ml)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"  {note.text}; Dice with the released brain {dice(brain, found):.3f}")
            print(
                f"  wall {wall:.0f} s, CPU {cpu:.0f} s, {torch.get_num_threads()} threads, peak memory {peak_mb() / 1024:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
