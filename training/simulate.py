"""Simulated patients: `python -m training.simulate --out BANK --cases N --seed S` fills a folder with them.

One seed, one patient: head -> posed and deformed person -> tissue parameters -> damage -> signals -> scanner -> case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ensemble.memory import keep_freed_memory
from ensemble.prepare.units import normalize_by_tissue
from training.acquisition import Acquired, acquire, draw_spacing
from training.anatomy import HELD_OUT_HEADS, TRAINING_HEADS, load_head, random_person
from training.bank import CHANNELS, cut, write
from training.draw import Draw
from training.lesions import draw_damage, load_lesions
from training.signals import DiffusionProtocol
from training.tissues import ParameterMaps, Tissue, parameter_maps

SHARED = Path(__file__).resolve().parents[2] / "shared"
LESION_FREE_SHARE = 0.06
VALIDATION_SEED = 900_000  # the validation set: this seed and the next ones, every third patient without lesion


def simulate(
    seed: int,
    shared: Path = SHARED,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    lesion_free: bool | None = None,
    held_out: bool = False,
    protocol: DiffusionProtocol | None = None,
    device: str = "cpu",
) -> Acquired:
    """The patient of one seed.

    Args:
        seed: the same seed gives the same case.
        shared: folder that holds `anatomy/` and `lesions/`.
        spacing_mm: voxel size (z, y, x); drawn as in ISLES'22 if None.
        lesion_free: drawn if None.
        held_out: from the heads and lesion shapes that no training sees, instead of the others.
        protocol: of the DWI; drawn if None.
    """
    draw = Draw(seed, device)
    library = load_lesions(shared).part(held_out=held_out)
    person = random_person(load_head(shared, draw.choice(HELD_OUT_HEADS if held_out else TRAINING_HEADS)), draw)
    free = draw.chance(LESION_FREE_SHARE)
    grid = draw_spacing(draw)
    maps = parameter_maps(person.classes, draw)
    emphasise_tracts(maps, person.tract, draw)
    brighten_plexus(maps, person.classes, draw)
    damage = draw_damage(person, library, draw, free if lesion_free is None else lesion_free)
    return acquire(person, maps, damage, spacing_mm or grid, draw, protocol=protocol)


def emphasise_tracts(maps: ParameterMaps, tract: torch.Tensor, draw: Draw) -> None:
    """Internal capsule, corticospinal tract and splenium: ADC lower by 5-35 %, T2 higher by up to 15 % (on both sides alike)."""
    maps.adc *= 1 - draw.uniform(0.05, 0.35) * tract
    maps.t2_ms *= 1 + draw.uniform(0.0, 0.15) * tract


def brighten_plexus(maps: ParameterMaps, classes: torch.Tensor, draw: Draw) -> None:
    """Choroid plexus cysts, bright on DWI in some people: lower ADC with a long T2."""
    if draw.chance(0.35):
        plexus = (classes == Tissue.CHOROID_PLEXUS) & (draw.field(classes.shape, 8.0)[0] > 0.3)
        maps.adc[plexus] = draw.uniform(0.9, 1.5)
        maps.t2_ms[plexus] = draw.uniform(150, 350)


def normalised(case: Acquired) -> tuple[np.ndarray, np.ndarray]:
    """Physical intensities as at inference: float16 (3: DWI, ADC, FLAIR; z, y, x), and uint8 labels (z, y, x)."""
    stack, label = cut(_physical(case), case.lesion.cpu().numpy())
    return stack.astype(np.float16), label


def _physical(case: Acquired) -> np.ndarray:
    dwi, adc, flair, brain = (image.cpu().numpy() for image in (case.dwi, case.adc, case.flair, case.brain))
    images = normalize_by_tissue(dwi, adc, flair, brain)
    return np.stack([images[modality] for modality in CHANNELS])


def write_case(folder: Path, seed: int, case: Acquired) -> Path:
    """One patient of the bank."""
    return write(folder / f"case_{seed:07d}.npz", _physical(case), case.lesion.cpu().numpy(), case.spacing_mm)


def validation_case(index: int, shared: Path = SHARED) -> Acquired:
    """Return a patient of the fixed validation set, with heads and lesion shapes kept out of training; every third has no lesion."""
    return simulate(VALIDATION_SEED + index, shared, lesion_free=index % 3 == 2, held_out=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.simulate", description="Fill a folder with simulated patients."
    )
    parser.add_argument("--out", type=Path, required=True, help="the bank: a folder outside the repository")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the first patient; the others follow")
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/ (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for number in range(options.cases):
        seed = options.seed + number
        if not (options.out / f"case_{seed:07d}.npz").exists():
            write_case(options.out, seed, simulate(seed, options.shared, device=options.device))
        if number % 20 == 19:
            print(f"{number + 1} cases, {(time.monotonic() - start) / (number + 1):.2f} s each", flush=True)


if __name__ == "__main__":
    main()
