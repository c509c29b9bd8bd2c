"""Our seals member against the peer's recorded time: same case, same weights (one fold), same number of CPU threads.

    python -m benchmarks.seals_speed [--shared ../shared] [--tta mirror]

The peer (DeepISLES' SEALS scripts with nnU-Net v1) was timed once, on one thread; its CPU seconds, user and system, stand in the
golden reference's `timings.json`. Ours are counted the same way: all of this process, imports and loading of weights included. CPU
seconds, not wall time, because the peer's machine was busy. Also prints whether the masks are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v1.member import NnunetV1Member
from ensemble.members.manifest import find_members
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality, ignore_progress

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CASE = "isles22_0009"
#: The peer's steps for one fold.
STEPS = ("task500_respace", "predict_fold0", "recover_fold0", "ensemble", "threshold_redirect")


def main() -> None:
    parser = argparse.ArgumentParser(description="our seals member against the peer's recorded time")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with golden/ and cases/")
    parser.add_argument("--tta", choices=("mirror", "gated", "none"), default="mirror")
    options = parser.parse_args()
    golden, images = options.shared / "golden" / "seals_v1", options.shared / "cases" / CASE
    torch.set_num_threads(1)
    imported = time.process_time()
    (spec,) = find_members(golden / "weights")
    settings = InferenceSettings(device="cpu", tta=options.tta)
    member = NnunetV1Member.load(spec, settings)
    loaded = time.process_time()
    case = prepare_raw(
        read_case_files(CASE, {Modality.DWI: images / "dwi.nii.gz", Modality.ADC: images / "adc.nii.gz"})
    )
    prepared, started = time.process_time(), time.perf_counter()
    probability = member.predict(case, settings, ignore_progress).probability.array
    wall, predicted = time.perf_counter() - started, time.process_time()
    theirs = _peer(json.loads((golden / CASE / "timings.json").read_text(encoding="utf-8")))
    print(f"ours, CPU s: imports {imported:.1f}, weights {loaded - imported:.1f}, case {prepared - loaded:.1f},")
    print(f"  prediction {predicted - prepared:.1f} (wall {wall:.1f}), in all {predicted:.1f}")
    print(f"peer, CPU s: {', '.join(f'{step} {seconds:.1f}' for step, seconds in theirs.items())},")
    print(f"  in all {sum(theirs.values()):.1f}; ratio (peer / ours) {sum(theirs.values()) / predicted:.2f}")
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(golden / CASE / "lesion_msk_fold0.nii.gz"))) > 0
    mask = probability > 0.5
    print(
        f"masks: ours {np.count_nonzero(mask)} voxels, peer {np.count_nonzero(expected)}, {np.sum(mask != expected)} differ"
    )


def _peer(timings: dict[str, Any]) -> dict[str, float]:
    return {step: float(timings[step]["cpu_s"]) for step in STEPS}


if __name__ == "__main__":
    main()
