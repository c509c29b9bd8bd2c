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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ensemble.case import PreparedCase, prepare
from ensemble.members.base import InferenceSettings
from ensemble.members.manifest import MemberSpec
from ensemble.members.nnunet import NnunetMember
from ensemble.readers.imagefile import read_case
from ensemble.types import Modality, ignore_progress


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    files = {modality: path for modality in Modality if (path := getattr(options, modality.value))}
    case = prepare(read_case("benchmark", files))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or _made_folder(Path(scratch), options)
        member = NnunetMember.load(MemberSpec("benchmark", "nnunet", folder), InferenceSettings(tta=options.tta))
        reference = _reference(folder, options.tta)
        ours, theirs = [], []
        for turn in range(options.rounds):
            seconds, probability = _timed(lambda: _ours(member, case, options.tta))
            ours.append(seconds)
            seconds, expected = _timed(lambda: _theirs(reference, member, case))
            theirs.append(seconds)
            print(f"round {turn + 1}: ours {ours[-1]:.2f} s, nnUNetPredictor {theirs[-1]:.2f} s", flush=True)
    print(f"median: ours {median(ours):.2f} s, nnUNetPredictor {median(theirs):.2f} s, {options.threads} thread(s)")
    print(f"ratio (theirs / ours): {median(theirs) / median(ours):.2f}")
    print(f"mean absolute difference of probabilities: {np.abs(probability - expected).mean():.1e}")


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


def _ours(member: NnunetMember, case: PreparedCase, tta: Any) -> np.ndarray:
    return member.predict(case, InferenceSettings(tta=tta), ignore_progress).probability.array


def _theirs(reference: Any, member: NnunetMember, case: PreparedCase) -> np.ndarray:
    images = np.stack([case.images[channel.modality].array for channel in member.channels])
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


def _timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
