"""Simulated patients: `python -m training.simulate --out BANK --cases N --seed S` fills a folder with them.

One seed, one patient: head -> posed and deformed person -> tissue parameters -> damage -> signals -> scanner -> case.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ensemble.memory import keep_freed_memory
from ensemble.prepare.units import normalize_by_tissue
from ensemble.types import Modality
from training.acquisition import Acquired, acquire, draw_spacing
from training.anatomy import HELD_OUT_HEADS, TRAINING_HEADS, load_head, random_person
from training.draw import Draw
from training.lesions import draw_damage, load_lesions
from training.tissues import ParameterMaps, Tissue, parameter_maps

SHARED = Path(__file__).resolve().parents[2] / "shared"
LESION_FREE_SHARE = 0.06
ISOTROPIC_MM = (2.0, 2.0, 2.0)
VALIDATION_SEED = 900_000  # the validation set: this seed and the next ones, every third patient without lesion


def simulate(
    seed: int,
    shared: Path = SHARED,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    lesion_free: bool | None = None,
    held_out: bool = False,
    device: str = "cpu",
) -> Acquired:
    """The patient of one seed.

    Args:
        seed: the same seed gives the same case.
        shared: folder that holds `anatomy/` and `lesions/`.
        spacing_mm: voxel size (z, y, x); drawn as in ISLES'22 if None.
        lesion_free: drawn if None.
        held_out: from the heads and lesion shapes that no training sees, instead of the others.
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
    return acquire(person, maps, damage, spacing_mm or grid, draw)


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
    brain = case.brain.cpu().numpy()
    images = normalize_by_tissue(case.dwi.cpu().numpy(), case.adc.cpu().numpy(), case.flair.cpu().numpy(), brain)
    stack = np.stack([images[m] for m in (Modality.DWI, Modality.ADC, Modality.FLAIR)])
    label = case.lesion.cpu().numpy()
    box = tuple(
        slice(int(np.flatnonzero(brain.any(a))[0]), int(np.flatnonzero(brain.any(a))[-1]) + 1)
        for a in ((1, 2), (0, 2), (0, 1))
    )
    return stack[(slice(None), *box)].astype(np.float16), label[box]


def isotropic(stack: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Bring a case to 2 mm as the members' preprocessing does (cubic for thin, nearest-slice for very thick slices)."""
    if tuple(spacing_mm) == ISOTROPIC_MM:
        return stack, label
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

    size = compute_new_shape(stack.shape[1:], spacing_mm, ISOTROPIC_MM)
    images = resample_data_or_seg_to_shape(
        stack.astype(np.float32), size, spacing_mm, ISOTROPIC_MM, is_seg=False, order=3, order_z=0
    )
    outline = torch.from_numpy(label[None, None].astype(np.float32))
    soft = F.interpolate(outline, size=tuple(int(n) for n in size), mode="trilinear", align_corners=False)[0, 0]
    return np.asarray(images, dtype=np.float16), (soft.numpy() > 0.5).astype(np.uint8)


def write_case(folder: Path, seed: int, case: Acquired) -> Path:
    """One patient as an uncompressed .npz, complete or not there at all: native grid, and 2 mm where that differs."""
    stack, label = normalised(case)
    content: dict[str, Any] = {
        "images": stack,
        "label": label,
        "spacing_mm": np.array(case.spacing_mm, dtype=np.float32),
    }
    if case.spacing_mm != ISOTROPIC_MM:
        content["images_2mm"], content["label_2mm"] = isotropic(stack, label, case.spacing_mm)
    path = folder / f"case_{seed:07d}.npz"
    draft = folder / f".{path.name}.{os.getpid()}"
    with draft.open("wb") as file:
        np.savez(file, **content)
    draft.rename(path)
    return path


def validation_case(index: int, shared: Path = SHARED) -> Acquired:
    """The fixed validation set, of heads and lesion shapes that no training sees; every third patient has no lesion."""
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
