"""Peak memory of the whole published ensemble: 5 SEALS, 15 NVAUTO and 10 SWAN networks of the published sizes in one process.

    python -m benchmarks.published_memory [--device auto] [--limit-gb 8] [--threads 1] [--packed] [--whole]

Weights are random (the tests' builders, in a temporary folder; MONAI gives the shapes of NVAUTO's), the image is noise of the size of
isles22_0009: masks mean nothing, memory does. All members are loaded; then each works until its first windows are through, which is when
it needs the most, and stops there, so that a CPU gets through in minutes. With --whole it goes on to the end: hours of one core. The exit
code is 1 above the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.made_up import made_up_case, write_nvauto, write_seals, write_swan
from benchmarks.memory import peak_mb
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.inference.device import describe_device, resolve_device
from ensemble.members.manifest import find_members
from ensemble.members.pack import pack_members
from ensemble.types import Modality, ProgressCallback, ignore_progress

SHAPE, SPACING_MM = (73, 112, 112), 2.0
NETWORKS = {"seals": 5, "nvauto": 15, "swan": 10}


class EnoughError(Exception):
    """A member has shown what it needs."""


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    settings = InferenceSettings(device=device, tta="mirror", allow_torchscript=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        write_seals(weights, NETWORKS["seals"])
        write_nvauto(weights, NETWORKS["nvauto"])
        write_swan(weights, NETWORKS["swan"] // 2)
        if options.packed:
            pack_members(weights, weights := Path(scratch) / "packed", "fp32")
        before, started = peak_mb(), time.perf_counter()
        members = [family_of(spec).load(spec, settings) for spec in find_members(weights)]
        print(f"{', '.join(f'{count} of {name}' for name, count in NETWORKS.items())} on {describe_device(device)}")
        print(
            f"loaded in {time.perf_counter() - started:.0f} s: peak {peak_mb():.0f} MB, {before:.0f} MB before",
            flush=True,
        )
        case = made_up_case(SHAPE, SPACING_MM, tuple(Modality))
        for member in members:
            started = time.process_time()
            with contextlib.suppress(EnoughError):
                member.predict(case, settings, ignore_progress if options.whole else _stop())
            print(f"{member.name}: {time.process_time() - started:.0f} CPU s, peak {peak_mb():.0f} MB", flush=True)
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MB allocated")
    within = peak_mb() < options.limit_gb * 1024
    print(f"peak resident memory {peak_mb():.0f} MB, limit {options.limit_gb} GB: {'within' if within else 'ABOVE'}")
    return int(not within)


def _stop() -> ProgressCallback:
    def progress(done: int, total: int) -> None:
        if done:
            raise EnoughError

    return progress


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--limit-gb", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help="the networks as members pack writes them")
    parser.add_argument("--whole", action="store_true", help="to the end of each member's work")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
