"""Is a b0 or T2 image in the place of the DWI told from a DWI, on simulated patients of all protocols?

    python -m benchmarks.unweighted [--patients 100] [--first-seed 990000] [--shared ../shared] [--journal FILE]

Each patient (seed, seed + 1, ...) is scanned twice: once with the DWI and its ADC, and once with a b0 (even seeds) or a T2-weighted image
(odd seeds) in the DWI's place, with the true ADC. What varies: anatomy and age, lesions (every eighth patient has one of up to 250 ml), b
(500 to 2000 s/mm^2), TE, TR, noise, grid, coil, distortion, a skull with fat and noisy air (one patient of three) or air that is 0 (one of
three), and slabs of half a brain (every seventh). HD-BET does not run: the true brain stands in for what it finds. A journal keeps
what was done, so that calling again goes on. Needs ../shared. Exit code 1 when a DWI is refused, or less than 95 % of the others are. Seeds
from 970000 and 980000 chose the thresholds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.memory import keep_freed_memory
from ensemble.prepare import skull
from ensemble.prepare.case import prepare_raw
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import AnyArray, BoolArray, Modality
from ensemble.volume import Volume
from training.acquisition import draw_spacing, soften, to_voxels
from training.anatomy import HEADS, brain_hull, load_head, random_person
from training.artefacts import coil_shading, displace, ghost, susceptibility_shift
from training.draw import Draw
from training.lesions import Damage, draw_damage, load_lesions
from training.signals import (
    FlairProtocol,
    adc_from_signals,
    diffusion_attenuation,
    inversion_recovery,
    rician,
    spin_echo,
)
from training.simulate import SHARED, brighten_plexus, emphasise_tracts
from training.tissues import ParameterMaps, parameter_maps

FIRST_SEED = 990_000
MIN_REFUSED = 0.95
#: Around the brain: how far out (mm); proton density, T1, T2 (ms), ADC (1e-3 mm^2/s) of CSF, bone, scalp.
_FLUID_MM, _BONE_MM, _SCALP_MM = 2.5, 9.0, 15.0


@dataclass(frozen=True)
class Scan:
    """What a patient's examination holds, on the DWI's grid; arrays (z, y, x), float32."""

    seed: int
    b_s_per_mm2: float
    spacing_zyx_mm: tuple[float, float, float]
    images: dict[str, AnyArray]
    """The DWI, and what may stand in its place: "dwi", "b0", "t2", "flair"."""
    adc: AnyArray
    brain: BoolArray
    skull: str
    """Whether it is there: "extracted" before, "masked" (air is 0), "noisy"."""
    lesion_ml: float


def scan(seed: int, shared: Path = SHARED) -> Scan:
    """One patient. The same seed gives the same images."""
    draw = Draw(seed)
    person = random_person(load_head(shared, draw.integer(0, HEADS)), draw)
    healthy = parameter_maps(person.classes, draw)
    emphasise_tracts(healthy, person.tract, draw)
    brighten_plexus(healthy, person.classes, draw)
    damage = draw_damage(person, load_lesions(shared), draw, False)
    hull = brain_hull(person.classes, draw)
    if seed % 8 == 0:
        damage = _with_large_lesion(damage, hull, draw)
    maps = damage.apply(healthy)
    b = draw.choice((500.0, 600.0, 800.0, 1000.0, 1000.0, 1200.0, 1500.0, 2000.0))
    te, tr = draw.uniform(55, 110), draw.uniform(3000, 9000)
    t2_te, t2_tr = draw.uniform(75, 120), draw.uniform(3000, 7000)
    b0, t2 = spin_echo(maps, te, tr), spin_echo(maps, t2_te, t2_tr)
    flair = inversion_recovery(
        maps, FlairProtocol(draw.uniform(80, 140), draw.uniform(7000, 10000), draw.uniform(2250, 2600))
    )
    images = torch.stack([b0 * diffusion_attenuation(maps.adc, b), b0, t2, flair, hull, damage.acute])
    if draw.chance(0.8):
        moved = displace(images, susceptibility_shift(hull, draw))
        images = torch.cat([moved[:2], images[2:4], moved[4:]])
    images[:4] *= coil_shading(hull.shape, draw)
    spacing = draw_spacing(draw)
    voxels = to_voxels(images, spacing)
    brain = voxels[4] > 0.5
    keep = slice(None)
    if seed % 7 == 0:  # a slab: the lower or the upper part
        middle = voxels.shape[1] // 2
        keep = slice(middle, None) if draw.chance(0.5) else slice(0, middle)
        voxels, brain = voxels[:, keep], brain[keep]
    lesion_ml = float((voxels[5] > 0.4).sum()) * math.prod(spacing) / 1000
    signals = voxels[:4]
    skull = ("extracted", "masked", "noisy")[seed % 3]
    if skull != "extracted":
        signals, brain = _with_head(signals, brain, spacing, b, te, tr, t2_te, t2_tr, draw)
    level = float(signals[0][brain].median())
    sigma = level / draw.uniform(6, 35)
    weighted, b0 = (rician(signals[0], sigma * math.sqrt(3), draw, 3), rician(signals[1], sigma, draw))
    others = [rician(image, float(image[brain].median()) / draw.uniform(15, 60), draw) for image in signals[2:4]]
    if draw.chance(0.3):
        strength = draw.uniform(0, 0.03)
        weighted, b0 = ghost(weighted, strength), ghost(b0, strength)
    if draw.chance(0.5):
        smooth = draw.uniform(0.02, 0.16)
        weighted, b0 = soften(weighted, smooth), soften(b0, smooth)
    adc = adc_from_signals(b0, weighted, b).clamp_min(0)
    found = {"dwi": weighted, "b0": b0, "t2": others[0], "flair": others[1]}
    if skull == "extracted":
        found, adc = {name: image * brain for name, image in found.items()}, adc * brain
    elif skull == "masked":
        there = b0 > draw.uniform(0.1, 0.3) * float(b0[brain].median())
        found, adc = {name: image * there for name, image in found.items()}, adc * there
    if seed % 7 == 0 and skull != "extracted":  # no skull covers the cut
        shown = np.flatnonzero(brain.numpy().any((1, 2)))
        view = slice(int(shown[0]), None) if keep.start else slice(0, int(shown[-1]) + 1)
        found, adc, brain = {name: image[view] for name, image in found.items()}, adc[view], brain[view]
    unit = draw.choice((1.0, 1e-3, 1e3))
    return Scan(
        seed,
        b,
        spacing,
        {name: image.numpy() * 500 / level for name, image in found.items()},
        adc.numpy() * unit,
        brain.numpy(),
        skull,
        lesion_ml,
    )


def _with_large_lesion(damage: Damage, hull: Tensor, draw: Draw) -> Damage:
    """A ball of infarct of up to 250 ml in one hemisphere as well."""
    radius = (draw.uniform(80, 250) * 1000 * 3 / (4 * math.pi)) ** (1 / 3)
    z, y, x = (torch.arange(n, dtype=torch.float32) for n in hull.shape)
    nz, ny, nx = hull.shape
    side = draw.choice((0.28, 0.72))
    inside = (
        (z[:, None, None] - 0.6 * nz) ** 2 + (y[None, :, None] - 0.5 * ny) ** 2 + (x - side * nx) ** 2
    ) < radius**2
    share = inside.float()
    adc, t2 = draw.uniform(0.4, 0.75), draw.uniform(1.0, 2.2)
    keep = 1 - share
    return replace(
        damage,
        acute=torch.maximum(damage.acute, share),
        log_adc=damage.log_adc * keep + math.log(adc) * share,
        log_t2=damage.log_t2 * keep + math.log(t2) * share,
    )


def _with_head(
    signals: Tensor,
    brain: Tensor,
    spacing: tuple[float, float, float],
    b: float,
    te: float,
    tr: float,
    t2_te: float,
    t2_tr: float,
    draw: Draw,
) -> tuple[Tensor, Tensor]:
    """CSF, bone and scalp around the brain, with room around the head; scalp is fat, more or less suppressed on diffusion images."""
    margin = [max(1, round(24 / mm)) for mm in spacing]
    pad = [n for m in reversed(margin) for n in (m, m)]
    signals = torch.nn.functional.pad(signals * brain, pad)
    brain = torch.nn.functional.pad(brain.to(torch.uint8), pad) > 0
    distance = torch.from_numpy(ndimage.distance_transform_edt(~brain.numpy(), spacing)).float()
    scale = 1 + 0.3 * torch.from_numpy(ndimage.gaussian_filter(draw.randn(brain.shape).numpy(), 2.0)) * 5
    suppressed = draw.uniform(0.05, 1.0)
    layers = (
        (0.0, _FLUID_MM, (1.0, 4300, 1200, 3.0), 1.0),
        (_FLUID_MM, _BONE_MM, (0.08, 500, 60, 0.3), 1.0),
        (_BONE_MM, _SCALP_MM, (0.9, 300, 80, draw.uniform(0.05, 1.0)), suppressed),
    )
    for inner, outer, (density, t1, t2, adc), fat in layers:
        there = (distance > inner) & (distance <= outer)
        maps = ParameterMaps(*(torch.full((1,), float(v)) for v in (density, t1, t2, adc)))
        echo, turbo = float(spin_echo(maps, te, tr)), float(spin_echo(maps, t2_te, t2_tr))
        inverted = float(inversion_recovery(maps, FlairProtocol()))
        for channel, value in enumerate((echo * math.exp(-b * 1e-3 * adc) * fat, echo * fat, turbo, inverted)):
            signals[channel][there] = (value * scale)[there].clamp_min(0)
    return signals, brain


def verdict(scan: Scan, name: str) -> str:
    """Why a case with this image in the DWI's place is refused; empty where it isn't. The true brain stands in for HD-BET's."""
    z, y, x = scan.spacing_zyx_mm
    nz, ny, nx = scan.adc.shape
    grid = Grid((nx, ny, nz), (x, y, z), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    arrays = {Modality.DWI: scan.images[name], Modality.ADC: scan.adc}
    images = {m: RawImage(Path(m.value), Volume(array.astype(np.float32), grid)) for m, array in arrays.items()}
    with patch.object(skull, "_brain_probability", lambda *_: scan.brain):
        try:
            prepare_raw(RawCase(str(scan.seed), images), brain_ml=(100.0, 2500.0))  # slabs are small
        except InputRefused as refusal:
            return str(refusal)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="is a b0 or T2 image in the place of the DWI told from a DWI?")
    parser.add_argument("--patients", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/")
    parser.add_argument("--journal", type=Path, help="file that keeps what was done")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    lines = options.journal.read_text().splitlines() if options.journal and options.journal.is_file() else []
    known = {entry["seed"]: entry for entry in map(json.loads, lines)}
    counts: Counter[str] = Counter()
    for seed in range(options.first_seed, options.first_seed + options.patients):
        if seed not in known:
            one = scan(seed, options.shared)
            said = {name: verdict(one, name) for name in ("dwi", ("b0", "t2")[seed % 2])}
            what = f"{one.skull}, b = {one.b_s_per_mm2:g}, {one.lesion_ml:.0f} ml of lesion"
            known[seed] = {"seed": seed, "what": what, "said": said}
            if options.journal:
                with options.journal.open("a") as file:
                    file.write(json.dumps(known[seed]) + "\n")
        for name, why in known[seed]["said"].items():
            counts[f"{name} refused"] += bool(why)
            counts[name] += 1
            if bool(why) == (name == "dwi"):
                print(f"seed {seed} ({known[seed]['what']}): {name} {why or 'accepted'}", flush=True)
    for name in ("dwi", "b0", "t2"):
        print(f"{name}: {counts[f'{name} refused']} of {counts[name]} refused")
    others = counts["b0"] + counts["t2"]
    sys.exit(bool(counts["dwi refused"] or counts["b0 refused"] + counts["t2 refused"] < MIN_REFUSED * others))


if __name__ == "__main__":
    main()
