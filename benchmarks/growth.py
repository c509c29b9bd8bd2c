"""How time and memory grow with the brain's size: one member on images of 1, 2, 4 and 8 times the voxels, without mirroring.

A process a size, so that each has its own peak of memory. The images are noise, nowhere zero: all of them is "brain".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_mb
from ensemble.inference.tiling import Shape, Tiling

ROOT = Path(__file__).resolve().parent.parent
#: What OpenVINO allocates for itself when it first runs.
OPENVINO_BYTES = 40 << 20
#: Voxels along z, y, x at 2 mm, the last three doubling one axis each: 1, 2, 4, 8 times as many.
SIZES = ((72, 88, 72), (144, 88, 72), (144, 176, 72), (144, 176, 144))


def main() -> None:
    """Child process: one size, one member; prints JSON."""
    weights, member, threads, *shape = sys.argv[1:]
    print(json.dumps(_once(Path(weights), member, int(threads), (int(shape[0]), int(shape[1]), int(shape[2])))))


def growth(weights: Path, member: str, threads: int) -> dict[str, Any]:
    """Seconds, peak memory and the memory that the formula says, for each size; straight lines over voxels and over windows."""
    rows = []
    for shape in SIZES:
        command = [sys.executable, "-m", "benchmarks.growth", str(weights), member, str(threads), *map(str, shape)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    lines = {unit: _line([row[unit] for row in rows], [row["cpu_s"] for row in rows]) for unit in ("voxels", "windows")}
    return {"member": member, "rows": rows, "lines": lines}


def _line(units: list[float], seconds: list[float]) -> dict[str, float]:
    """The straight line through seconds over units, and how far the farthest measurement lies from it."""
    slope, intercept = np.polyfit(units, seconds, 1)
    apart = np.abs(slope * np.array(units) + intercept - seconds).max()
    return {"slope": float(slope), "intercept_s": float(intercept), "farthest_s": float(apart)}


def stated_bytes(
    voxels: int, channels: int, classes: int, window: tuple[int, ...], features: int, batch: int, weights: int
) -> int:
    """The formula of docs/architecture.md: arrays of the image's size, activations of one batch of windows, packed kernels."""
    from ensemble.families.unet import window_bytes

    # images as read and physical (2 each), channels in three steps of preprocessing, answers, weights, probability back and forth
    of_image = (4 + 3 * channels + 2 * classes + 4) * voxels * 4
    return of_image + weights + batch * window_bytes(window, features) + OPENVINO_BYTES


def _once(folder: Path, member: str, threads: int, shape: Shape) -> dict[str, Any]:
    from ensemble.memory import keep_freed_memory

    keep_freed_memory()
    import torch

    from benchmarks.made_up import made_up_case
    from ensemble.families.base import InferenceSettings
    from ensemble.families.nnunet_v2.member import NnunetV2Member
    from ensemble.members.manifest import find_members
    from ensemble.types import ignore_progress
    from ensemble.weights.checkpoints import read_checkpoint

    torch.set_num_threads(threads)
    (spec,) = find_members(folder, (member,))
    settings = InferenceSettings(tta="none")
    loaded = NnunetV2Member.load(spec, settings)
    case = made_up_case(shape, spacing_mm=2.0)
    before = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    loaded.predict(case, settings, ignore_progress)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    how, voxels = loaded._windows(settings), int(np.prod(shape))
    features = loaded.plans.architecture.kwargs["features_per_stage"][0]
    states = [read_checkpoint(path)["network_weights"] for path in spec.folder.rglob("*.pth")]
    # state dicts name a tensor more than once
    packed = sum(sum({t.data_ptr(): 4 * t.numel() for t in state.values()}.values()) for state in states)
    channels, classes = len(loaded.channels), loaded.plans.classes
    stated = stated_bytes(voxels, channels, classes, how.window, features, how.batch_size, packed)
    return {
        "voxels": voxels,
        "windows": len(Tiling(shape, how.window, how.blending).windows()),
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mb": peak_mb(),
        "before_mb": before,
        "stated_mb": before + stated / 2**20,
    }


if __name__ == "__main__":
    main()
