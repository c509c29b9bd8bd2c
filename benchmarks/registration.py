"""Does FLAIR come to lie on the same place wherever its header says it is, and how long does it take?

    python -m benchmarks.registration [--cases ../shared/cases] [--starts 8] [--degrees 8] [--mm 8]

The FLAIR of each case is displaced by known rigid motions (its header, not its voxels; the first start is as released) and registered to
DWI. Printed: how far brain voxels land from the median of all starts, mean and worst start, in mm; normalised mutual information; time.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import SimpleITK as sitk

from ensemble.prepare import registration
from ensemble.prepare.case import prepare_raw
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume
from training.evaluate import real_cases
from training.simulate import SHARED


def main() -> None:
    parser = argparse.ArgumentParser(description="spread and time of FLAIR's registration")
    parser.add_argument("--cases", type=Path, default=SHARED / "cases")
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--degrees", type=float, default=8.0)
    parser.add_argument("--mm", type=float, default=8.0)
    options = parser.parse_args()
    for truth in real_cases(options.cases):
        if Modality.FLAIR not in truth.raw.images:
            continue
        flair, dwi = (truth.raw.images[modality].volume for modality in (Modality.FLAIR, Modality.DWI))
        brain = prepare_raw(truth.raw).brain.array
        points = voxels_mm(dwi, brain)
        fixed, region = (
            registration._without_peaks(dwi.array),
            registration._with_margin(brain, dwi.grid.spacing_zyx_mm),
        )
        landed, information, seconds = [], [], []
        for displacement in displacements(options.starts, options.degrees, options.mm):
            moved = displaced(flair, displacement)
            by_header = resample_volume(moved, dwi.grid)
            started = time.perf_counter()
            found = registration.register_rigidly(moved, by_header, dwi, brain)
            seconds.append(time.perf_counter() - started)
            transform = found.transform or sitk.Euler3DTransform()
            back = displacement.GetInverse()
            landed.append([back.TransformPoint(transform.TransformPoint(point)) for point in points])
            aligned = registration._without_peaks(resample_volume(moved, dwi.grid, transform=transform).array)
            information.append(registration._information(fixed, aligned, region))
        apart = np.linalg.norm(np.array(landed) - np.median(landed, axis=0), axis=2).mean(axis=1)
        print(
            f"{truth.raw.name}: {len(landed)} starts end {apart.mean():.2f} mm apart (worst {apart.max():.2f}), normalised mutual "
            f"information {mean(information):.4f} (worst {min(information):.4f}), {mean(seconds):.2f} s"
        )


def displacements(count: int, degrees: float, mm: float) -> list[sitk.Euler3DTransform]:
    """Rigid motions about the scanner's origin: none, then random ones, the same each time."""
    random, motions = np.random.default_rng(0), []
    for number in range(count):
        transform = sitk.Euler3DTransform()
        if number:
            transform.SetRotation(*(math.radians(degrees) * random.uniform(-1, 1, 3)).tolist())
            transform.SetTranslation((mm * random.uniform(-1, 1, 3)).tolist())
        motions.append(transform)
    return motions


def displaced(image: Volume, motion: sitk.Euler3DTransform) -> Volume:
    """The same voxels, elsewhere."""
    turned = np.reshape(motion.GetMatrix(), (3, 3)) @ np.reshape(image.grid.direction, (3, 3))
    origin = motion.TransformPoint(image.grid.origin_mm)
    return replace(image, grid=replace(image.grid, origin_mm=origin, direction=tuple(turned.ravel().tolist())))


def voxels_mm(image: Volume, brain: AnyArray) -> list[list[float]]:
    """Some voxels of the brain, in scanner coordinates."""
    points: list[list[float]] = image.grid.points_mm(np.argwhere(brain)[::500]).tolist()
    return points


if __name__ == "__main__":
    main()
