"""Peak memory and time of the swan member with networks of the published size: ten of 29 and 6 million parameters, windows of 64^3.

    python -m benchmarks.swan_full_size [--device auto] [--folds 5] [--precision auto] [--shape 73 112 112] [--threads 1] [--load-only]
    python -m benchmarks.swan_full_size --openvino    # one network of each kind: is converting it worth its while?

Weights are random (the tests' builder, in a temporary folder), the image is noise of the given shape (z, y, x) at 2 mm: masks mean
nothing, time and memory do. The default is one window.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.made_up import made_up_case, write_swan
from benchmarks.memory import peak_mb
from ensemble.config import Precision
from ensemble.families.base import InferenceSettings
from ensemble.families.swan.checkpoints import network_specs
from ensemble.families.swan.folder import read_swan_folder
from ensemble.families.swan.member import SwanMember
from ensemble.families.swan.network import CHANNELS, WINDOW
from ensemble.inference.device import describe_device, resolve_device
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_openvino import open_openvino_session
from ensemble.inference.session_torch import TorchSession
from ensemble.inference.tiling import Tiling
from ensemble.members.manifest import find_members
from ensemble.types import Modality, ignore_progress


def main() -> None:
    parser = argparse.ArgumentParser(description="memory and time of full-size SWAN networks")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), help="of the image (z, y, x), 2 mm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load-only", action="store_true", help="load, and predict nothing")
    parser.add_argument("--openvino", action="store_true", help="one network of each kind, by PyTorch and by OpenVINO")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    precision: Precision = options.precision
    settings = InferenceSettings(device=resolve_device(options.device), precision=precision)
    with tempfile.TemporaryDirectory() as scratch:
        write_swan(Path(scratch), options.folds)
        (spec,) = find_members(Path(scratch))
        if options.openvino:
            _on_openvino(spec.folder)
            return
        before, started = peak_mb(), time.perf_counter()
        member = SwanMember.load(spec, settings)
        loading = time.perf_counter() - started
    networks = len(member.sessions)
    print(f"{networks} networks on {describe_device(settings.device)}, {member.sessions[0].arithmetic}")
    print(f"loaded in {loading:.1f} s; peak resident memory {peak_mb():.0f} MB, {before:.0f} MB before", flush=True)
    if options.load_only:
        return
    case, how = made_up_case(tuple(options.shape), 2.0, tuple(Modality)), member.windows
    x, y, z = case.grid.size
    windows = len(Tiling((x, y, z), how.window, how.blending).windows())
    wall, cpu = time.perf_counter(), time.process_time()
    member.predict(case, settings, ignore_progress)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"image {tuple(options.shape)}: {windows} windows by {networks} networks, {how.batch_size} at once")
    passes = windows * networks
    print(f"a network's window: {wall / passes:.2f} s wall, {cpu / passes:.2f} CPU s; the case: {cpu:.0f} CPU s")
    print(f"peak resident memory {peak_mb():.0f} MB")
    if settings.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MB allocated")


def _on_openvino(folder: Path) -> None:
    """Print what converting a network takes, and a window by either runtime (CPU seconds, the second of two)."""
    one_of_each = {network.weights.parents[2].name: network for network in network_specs(read_swan_folder(folder))}
    window = torch.randn(1, CHANNELS, *WINDOW)
    for kind, network in one_of_each.items():
        built = network.build()
        started = time.process_time()
        converted = open_openvino_session(built, network.channels, network.smallest_window, "fp32")
        print(f"{kind}: converted in {time.process_time() - started:.1f} CPU s", flush=True)
        sessions: list[LoadedSession] = [TorchSession(built, dims=3, device="cpu")]
        for session in sessions if converted is None else [*sessions, converted]:
            session(window)
            started = time.process_time()
            session(window)
            print(f"{kind}, {session.arithmetic}: a window in {time.process_time() - started:.2f} CPU s", flush=True)


if __name__ == "__main__":
    main()
