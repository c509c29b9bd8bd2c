"""Real brains without a lesion, as the members see them: `python -m training.backgrounds --shared ../shared --out BANK`.

Two kinds: volunteers' whole heads (`normals/`), stripped by the product itself, and the lesion-free hemispheres of public cases
(`cases/`), each joined to its own mirror image. `training.insertion` puts simulated lesions into them. No real lesion is ever trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, optimize

from ensemble.config import RunConfig
from ensemble.geometry import Triple
from ensemble.memory import keep_freed_memory
from ensemble.pipeline import Ensemble, load_from_config, segment_prepared
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, FloatArray, Modality
from training.bank import ISOTROPIC_MM, anterior, canonical, cut, isotropic
from training.evaluate import Truth, real_cases
from training.simulate import SHARED

SEARCHED_MM = 4.0  # voxel size at which the plane between the hemispheres is looked for
MIDLINE_MM = 2.0  # a lesion nearer to the plane than this spoils both hemispheres


@dataclass(frozen=True)
class Background:
    """A brain without lesion."""

    name: str
    images: FloatArray
    """(3: DWI, ADC, FLAIR; z, y, x), tissue-normalised, y to anterior; FLAIR is 0 everywhere where there is none."""
    spacing_mm: Triple
    """(z, y, x)"""


def volunteers(folder: Path) -> Iterator[Background]:
    """Whole heads: `<name>/dwi.nii.gz` and `adc.nii.gz`, stripped by HD-BET where the product finds a skull."""
    for head in sorted(path for path in folder.iterdir() if path.is_dir()):
        raw = read_case_files(head.name, {m: head / f"{m.value}.nii.gz" for m in (Modality.DWI, Modality.ADC)})
        images, spacing = canonical(prepare_raw(raw))
        yield Background(f"volunteer_{head.name}", images, spacing)


def hemispheres(folder: Path) -> Iterator[Background]:
    """Each hemisphere of the public cases in which there is no lesion, with its mirror image.

    Where the true mask is not known, the shipped ensemble's mask stands for it.
    """
    ensemble = load_from_config(RunConfig(tta="none"))
    for truth in real_cases(folder):
        case = prepare_raw(truth.raw)
        lesion = _lesion(truth, case, ensemble)
        images, spacing = canonical(case)
        lesion = anterior(case.grid.canonical().apply(lesion))
        straight, mask = straightened(images, lesion, spacing)
        for side, clean in zip("lr", clean_sides(mask, spacing), strict=True):
            if clean:
                yield Background(f"{truth.raw.name}_{side}", mirrored(straight, left=side == "l"), spacing)


def _lesion(truth: Truth, case: PreparedCase, ensemble: Ensemble) -> AnyArray:
    return (
        truth.mask if truth.mask is not None else segment_prepared(case, ensemble, SilentWatcher()).fused.mask.array > 0
    )


def straightened(images: FloatArray, lesion: AnyArray, spacing_mm: Triple) -> tuple[FloatArray, AnyArray]:
    """Turn a brain so that the plane between its hemispheres is the middle of the array along x."""
    coarse = ndimage.zoom(images[0], [s / SEARCHED_MM for s in spacing_mm], order=1)

    def asymmetry(turn: np.ndarray) -> float:
        moved = _turned(coarse, turn, (SEARCHED_MM,) * 3, order=1)
        return float(np.abs(moved - moved[:, :, ::-1]).mean())

    centre = ndimage.center_of_mass(coarse > 0)[2] - (coarse.shape[2] - 1) / 2
    first = np.array([centre * SEARCHED_MM, 0.0, 0.0])
    simplex = first + np.array([[0, 0, 0], [6, 0, 0], [0, 0.08, 0], [0, 0, 0.08]])
    best = optimize.minimize(asymmetry, first, method="Nelder-Mead", options={"initial_simplex": simplex}).x
    brain = _turned((images[0] > 0).astype(np.float32), best, spacing_mm, order=1) > 0.5
    moved = np.stack([_turned(image, best, spacing_mm, order=3) * brain for image in images]).clip(0, 8)
    return moved.astype(np.float32), _turned(lesion.astype(np.float32), best, spacing_mm, order=1) > 0.1


def _turned(image: FloatArray, turn: np.ndarray, spacing_mm: Triple, order: int) -> FloatArray:
    """Shift along x by `turn[0]` mm and rotate by `turn[1]`, `turn[2]` radians about z and y."""
    about_z, about_y = turn[1], turn[2]
    z = np.array([[1, 0, 0], [0, np.cos(about_z), -np.sin(about_z)], [0, np.sin(about_z), np.cos(about_z)]])
    y = np.array([[np.cos(about_y), 0, -np.sin(about_y)], [0, 1, 0], [np.sin(about_y), 0, np.cos(about_y)]])
    scale = np.diag(spacing_mm)
    matrix = np.linalg.inv(scale) @ z @ y @ scale
    middle = (np.array(image.shape) - 1) / 2
    offset = middle - matrix @ middle + np.array([0, 0, turn[0] / spacing_mm[2]])
    return np.asarray(ndimage.affine_transform(image, matrix, offset, order=order), np.float32)


def clean_sides(lesion: AnyArray, spacing_mm: Triple) -> tuple[bool, bool]:
    """Whether the half at low x (the patient's right) and that at high x hold no lesion, with margins."""
    middle, margin = lesion.shape[2] / 2, MIDLINE_MM / spacing_mm[2]
    low, high = int(np.ceil(middle + margin)), int(np.floor(middle - margin))
    return not lesion[:, :, :low].any(), not lesion[:, :, high:].any()


def mirrored(images: FloatArray, *, left: bool) -> FloatArray:
    """One half (channels, z, y, x), at low x (`left`: of the array) or high x, and its mirror image in place of the other."""
    half = images.shape[3] // 2
    part = images[..., :half] if left else images[..., images.shape[3] - half :]
    pair = (part, part[..., ::-1]) if left else (part[..., ::-1], part)
    return np.concatenate(pair, axis=3)


def write_background(folder: Path, background: Background) -> Path:
    """One brain as an uncompressed .npz: native grid, and 2 mm where that differs."""
    stack, none = cut(background.images.astype(np.float16), np.zeros(background.images.shape[1:], np.uint8))
    content = {"images": stack, "spacing_mm": np.array(background.spacing_mm, np.float32)}
    if background.spacing_mm != ISOTROPIC_MM:
        content["images_2mm"], _ = isotropic(stack, none, background.spacing_mm)
    path = folder / f"background_{background.name}.npz"
    np.savez(path, **content)  # type: ignore[arg-type]
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.backgrounds", description="Real brains without a lesion, for the bank."
    )
    parser.add_argument("--out", type=Path, required=True, help="the bank: a folder outside the repository")
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder with normals/ and cases/ (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for source, folder in ((hemispheres, "cases"), (volunteers, "normals")):
        for background in source(options.shared / folder):
            print(write_background(options.out, background), flush=True)


if __name__ == "__main__":
    main()
