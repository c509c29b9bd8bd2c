"""Peak memory and time of the seals member with networks of the published size: 31 million parameters, windows of 128^3, several folds.

    python -m benchmarks.seals_full_size [--device auto] [--folds 5] [--tta none] [--shape 128 128 128] [--threads 1]

Weights are random (the tests' builder, in a temporary folder), the image is a made-up head of the given shape (z, y, x) at 1 mm: masks
mean nothing, time and memory do. The default is one window and no flips, so that a CPU gets through; a real case has some eight
windows and eight flips (--shape 141 164 140 --tta mirror), in the same memory but for the image's own arrays.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.made_up import made_up_case, write_seals
from benchmarks.memory import peak_mb
from ensemble.families.base import InferenceSettings
from ensemble.families.nnunet_v1.member import NnunetV1Member
from ensemble.inference.device import describe_device, resolve_device
from ensemble.inference.tiling import Tiling
from ensemble.members.manifest import find_members
from ensemble.members.pack import pack_members
from ensemble.types import ignore_progress


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    settings = InferenceSettings(resolve_device(options.device), options.tta, session=options.session)
    case = made_up_case(tuple(options.shape))
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        write_seals(weights, options.folds)
        if options.packed:
            (weights,) = pack_members(weights, Path(scratch) / "packed", options.packed)
        (spec,) = find_members(weights)
        before, started = peak_mb(), time.perf_counter()
        member = NnunetV1Member.load(spec, settings)
        loading = time.perf_counter() - started
    where = f"{describe_device(settings.device)}, {member.sessions[0].arithmetic}"
    print(f"{options.folds} folds of 31.2 million parameters on {where}")
    print(f"loaded in {loading:.1f} s; peak resident memory {peak_mb():.0f} MB, {before:.0f} MB before")
    if options.load_only:
        return
    how = member.windows(settings)
    passes = len(Tiling(case.grid.shape_zyx, how.window).windows()) * len(how.flips) * options.folds
    wall, cpu = time.perf_counter(), time.process_time()
    member.predict(case, settings, ignore_progress)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"image {tuple(options.shape)}, {options.tta}: {passes} windows with flips and folds, {how.batch_size} at once"
    )
    print(
        f"a window: {wall / passes:.3f} s wall, {cpu / passes:.3f} CPU s; the case: {wall:.1f} s wall, {cpu:.1f} CPU s"
    )
    print(f"peak resident memory {peak_mb():.0f} MB")
    if settings.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MB allocated")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="memory and time of full-size SEALS networks")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--tta", choices=("mirror", "gated", "none"), default="none")
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 128, 128), help="of the image (z, y, x), 1 mm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--session", choices=("auto", "torch"), default="auto")
    parser.add_argument("--packed", choices=("fp32", "fp16"), help="pack the weights first")
    parser.add_argument("--load-only", action="store_true", help="load, and predict nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
