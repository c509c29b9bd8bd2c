"""Three small encoders of one budget that see DWI, DWI and ADC, or all three: `python -m training.spectral.small --bank BANK`.

The same seed, batches (of the same patients, scanned the same way), steps and network but for its first convolution: what differs is the
images. They are nnU-Net v2 folders, so that `members diagnose --weights` takes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ensemble.memory import keep_freed_memory
from training.batches import Bank
from training.command import call
from training.members import NEIGHBOURS, MemberSpec
from training.train import Length, Recipe, train

FOLDER = Path(".train/small")
STEPS, SEED = 240, 1
IMAGES = {"dwi": ("DWI",), "dwi_adc": ("DWI", "ADC"), "dwi_adc_flair": ("DWI", "ADC", "FLAIR")}


def spec_of(name: str) -> MemberSpec:
    """A 2.5-D network of 0.1 million weights."""
    return MemberSpec(
        name=name,
        configuration="2d",
        channels=tuple(f"{image}[{o:+d}]" if o else image for o in NEIGHBOURS for image in IMAGES[name]),
        spacing_mm=(2.0, 2.0),
        patch=(96, 80),
        training_patch=(96, 80),
        batch=24,
        features=(8, 16, 32, 64),
        convolutions=(1, 1, 1, 1),
        decoder_convolutions=(1, 1, 1),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train those that are not there yet."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.small", description=__doc__)
    parser.add_argument("--bank", type=Path, required=True, help="made by python -m training.simulate")
    parser.add_argument("--out", type=Path, default=FOLDER, help="weights folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", choices=IMAGES)
    options = parser.parse_args(arguments)
    return call(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    keep_freed_memory()
    torch.set_num_threads(1)
    for name in [options.only] if options.only else IMAGES:
        if (options.out / name / "plans.json").exists():
            continue
        torch.manual_seed(options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        state = options.out / f"{name}.state"
        recipe = Recipe(Length(steps=options.steps), options.seed)
        train(spec_of(name), Bank(options.bank), options.out / name, state, recipe, resume=False)
        state.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
