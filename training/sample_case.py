"""The sample case of the test suite: `python -m training.sample_case` writes `test/sample`, the same bytes of image every time.

A simulated patient with an infarct in the middle cerebral artery's territory and a few emboli, in the ISLES'22 contract's
layout. The geometry is oblique with an odd origin, and FLAIR lies on its own thicker grid, as in real cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from training.acquisition import acquire, flair_signal, to_voxels
from training.anatomy import Person, brain_hull, load_head, random_person
from training.draw import Draw
from training.lesions import Damage, LesionStage, add_emboli, insert, load_lesions, tissue_share, warped_shape
from training.signals import rician
from training.simulate import SHARED, emphasise_tracts
from training.tissues import parameter_maps

HEAD = 2
SEED = 1
VOLUME_ML = 14.0
EMBOLI = 4
STAGE = LesionStage(adc=0.5, t2=1.3)  # about a day old
DWI_SPACING_MM = (2.0, 2.0, 2.0)  # (z, y, x)
FLAIR_SPACING_MM = (5.0, 1.5, 1.5)
MULTIPLES_MM = (10, 6, 6)  # sizes at 1 mm that both grids divide
CORNER_LPS_MM = (-71.3, 98.7, -43.9)  # of the 1 mm grid's first voxel
TILT = (0.06, 0.21, -0.04)  # radians about z, x, y
NAME = "sample-stroke-case"
JSON_FILES = ("dwi-mri-acquisition-parameters.json", "adc-mri-parameters.json", "flair-mri-acquisition-parameters.json")


def write_sample(out: Path, shared: Path = SHARED, seed: int = SEED) -> float:
    """Write the sample case to `out`; returns the true lesion volume in ml."""
    draw = Draw(seed)
    person = _trimmed(random_person(load_head(shared, HEAD), draw))
    healthy = parameter_maps(person.classes, draw)
    emphasise_tracts(healthy, person.tract, draw)
    damage = _infarct(person, shared, draw)
    case = acquire(person, healthy, damage, DWI_SPACING_MM, draw)
    signal = to_voxels(
        flair_signal(damage.apply(healthy), brain_hull(person.classes, draw), draw)[None], FLAIR_SPACING_MM
    )[0]
    flair = rician(signal, float(signal[signal > 0].median()) / 40, draw) * (signal > 0)
    box = _box(case.brain)
    _write(out, "dwi", _scaled(case.dwi, 300)[box], DWI_SPACING_MM, [s.start for s in box])
    _write(out, "adc", (1000 * case.adc.clamp(0, 4.0))[box], DWI_SPACING_MM, [s.start for s in box])
    flair_box = _box(flair > 0)
    _write(out, "flair", _scaled(flair, 200)[flair_box], FLAIR_SPACING_MM, [s.start for s in flair_box])
    truth = out / "truth" / f"{NAME}.mha"
    _save(case.lesion[box].numpy(), truth, DWI_SPACING_MM, [s.start for s in box])
    for name in JSON_FILES:
        (out / "input" / name).write_text("{}\n")
    return float(case.lesion.sum()) * float(np.prod(DWI_SPACING_MM)) / 1000


def _trimmed(person: Person) -> Person:
    box = tuple(slice(0, n - n % m) for n, m in zip(person.classes.shape, MULTIPLES_MM, strict=True))
    return Person(person.classes[box], person.tract[box], person.source[box], person.head_shape)


def _infarct(person: Person, shared: Path, draw: Draw) -> Damage:
    tissue = tissue_share(person.classes)
    damage = Damage.none(tissue)
    shape = warped_shape(person, load_lesions(shared), VOLUME_ML, draw)
    insert(damage, shape * tissue, shape, STAGE, 1.0, draw)
    add_emboli(damage, person, tissue, EMBOLI, 2.0, STAGE, draw)
    return damage


def _box(mask: Tensor) -> tuple[slice, ...]:
    """The mask's bounding box with one voxel around it."""
    where = torch.nonzero(mask)
    return tuple(
        slice(max(0, int(low) - 1), int(high) + 2) for low, high in zip(where.amin(0), where.amax(0), strict=True)
    )


def _scaled(image: Tensor, tissue_value: float) -> Tensor:
    return image / image[image > 0].median() * tissue_value


def _write(out: Path, modality: str, image: Tensor, spacing_mm: Sequence[float], first: Sequence[int]) -> None:
    array = image.round().clamp(0, 32767).numpy().astype(np.int16)
    _save(array, out / "input" / "images" / f"{modality}-brain-mri" / f"{NAME}.mha", spacing_mm, first)


def _save(array: np.ndarray, path: Path, spacing_mm: Sequence[float], first: Sequence[int]) -> None:
    """Write with geometry only. Our axes point left, anterior, superior; LPS wants left, posterior, superior."""
    direction = _tilt() @ np.diag([1.0, -1.0, 1.0])
    spacing = np.array(spacing_mm[::-1])
    offset_mm = (np.array(first[::-1]) + 0.5) * spacing - 0.5  # of the first voxel's centre from the 1 mm grid's first
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.flatten().tolist())
    image.SetOrigin((np.array(CORNER_LPS_MM) + direction @ offset_mm).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def _tilt() -> np.ndarray:
    rotation = np.eye(3)
    for (i, j), angle in zip(((0, 1), (1, 2), (0, 2)), TILT, strict=True):
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    return rotation


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.sample_case", description="Write the test suite's sample case."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "test" / "sample")
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/ (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    print(f"{options.out}: lesion of {write_sample(options.out, options.shared, options.seed):.2f} ml")


if __name__ == "__main__":
    main()
