"""Our nnunet member against nnunetv2's nnUNetPredictor: same folder, same case, same threads, turn by turn in one process.

    python -m benchmarks.nnunet_speed --dwi DWI --adc ADC [--flair FLAIR] [--folder MODEL_FOLDER] [--threads 1] [--rounds 3]

Both start from images in memory with their network loaded, and end with the lesion probability on the images' grid: preprocessing,
all windows and flips, resampling back. Not counted: imports, loading of weights, reading of files. Without --folder a network of
random weights is made (--patch, --features, --spacing); masks mean nothing then, speed does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ensemble.families.base import InferenceSettings
from ensemble.families.channels import shift_slices
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality, ignore_progress


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    files = {modality: path for modality in Modality if (path := getattr(options, modality.value))}
    case = prepare_raw(read_case_files("benchmark", files))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or _made_folder(Path(scratch), options)
        member = NnunetV2Member.load(MemberSpec("benchmark", "nnunet", folder), InferenceSettings(tta=options.tta))
        reference = _reference(folder, options.tta)
        ours, theirs = [], []
        for turn in range(options.rounds):
            spent, probability = _timed(lambda: _ours(member, case, options.tta))
            ours.append(spent)
            spent, expected = _timed(lambda: _theirs(reference, member, case))
            theirs.append(spent)
            print(f"round {turn + 1}: ours {ours[-1]}, nnUNetPredictor {theirs[-1]}", flush=True)
    for what in ("wall", "cpu"):
        mine, reference_s = (median(getattr(spent, what) for spent in runs) for runs in (ours, theirs))
        print(
            f"median {what} time on {options.threads} thread(s): ours {mine:.2f} s, nnUNetPredictor {reference_s:.2f} s,"
            f" ratio (theirs / ours) {reference_s / mine:.2f}"
        )
    mask, expected_mask = probability > 0.5, expected > 0.5
    dice = 2 * (mask & expected_mask).sum() / max(1, mask.sum() + expected_mask.sum())
    print(
        f"Dice of the masks {dice:.5f}, mean absolute difference of probabilities {np.abs(probability - expected).mean():.1e}"
    )


@dataclass(frozen=True)
class Spent:
    """Seconds of one prediction."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cpu:.2f} CPU s)"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="our nnunet member against nnUNetPredictor")
    for modality in Modality:
        parser.add_argument(f"--{modality.value}", type=Path, required=modality is not Modality.FLAIR)
    parser.add_argument("--folder", type=Path, help="an nnU-Net v2 trained-model folder")
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 64, 64), help="window (z, y, x) of the made network")
    parser.add_argument("--features", type=int, default=16, help="features of the made network's first stage")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=(2.0, 2.0, 2.0), help="mm (z, y, x) of the made network"
    )
    parser.add_argument("--tta", choices=("mirror", "none"), default="mirror")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _made_folder(scratch: Path, options: argparse.Namespace) -> Path:
    """A folder of random weights, by the tests' builder."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))
    from nnunet_folders import FolderSpec, build_folder

    spec = FolderSpec(
        patch=tuple(options.patch),
        spacing_mm=tuple(options.spacing),
        features=options.features,
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    )
    return build_folder(scratch, spec)


def _ours(member: NnunetV2Member, case: PreparedCase, tta: Any) -> np.ndarray:
    return member.predict(case, InferenceSettings(tta=tta), ignore_progress).probability.array


def _theirs(reference: Any, member: NnunetV2Member, case: PreparedCase) -> np.ndarray:
    images = np.stack([shift_slices(case.images[c.modality].array, c.offset) for c in member.channels])
    properties = {"spacing": list(case.grid.spacing_zyx_mm)}
    probabilities: np.ndarray = reference.predict_single_npy_array(images, properties, None, None, True)[1]
    return probabilities[list(member.plans.lesion_classes)].sum(0)


def _reference(folder: Path, tta: str) -> Any:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(variable, "unused")  # nnunetv2 complains at import otherwise
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=tta == "mirror", allow_tqdm=False)
    folds = sorted(path.name[5:] for path in folder.glob("fold_*"))
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def _timed(run: Callable[[], np.ndarray]) -> tuple[Spent, np.ndarray]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu), result


if __name__ == "__main__":
    main()
