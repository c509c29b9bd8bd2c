"""Which share of the time a GPU computes while a case goes through the members: `python -m benchmarks.gpu_busy --dwi F --adc F --out DIR`.

Keeps the profiler's table and trace in --out. Needs a GPU; says so and ends with exit code 2 without.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.pipeline import load, segment
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_files
from ensemble.types import Modality


def main() -> int:
    parser = argparse.ArgumentParser(description="share of the time that the GPU is busy")
    for modality in Modality:
        parser.add_argument(f"--{modality.value}", type=Path, required=modality is not Modality.FLAIR)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 2
    ensemble = load(RunConfig(weights=options.weights, device="cuda"))
    raw = read_files("benchmark", {m: path for m in Modality if (path := getattr(options, m.value))})
    for _ in range(2):
        segment(raw, ensemble, SilentWatcher())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        result = segment(raw, ensemble, SilentWatcher())
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    inference = sum(seconds for stage, seconds in result.seconds.items() if stage.startswith("member"))
    options.out.mkdir(parents=True, exist_ok=True)
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    (options.out / "gpu_busy.txt").write_text(table)
    profiler.export_chrome_trace(str(options.out / "gpu_busy.json"))
    print(
        f"{wall:.3f} s a case, {inference:.3f} s in members, GPU busy {busy:.3f} s: {busy / inference:.0%} of inference"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
