"""The nvauto member beside the peer's recorded CPU seconds a stage; or one window of a network of the usual full size.

    python -m benchmarks.nvauto_speed [--golden ../shared/golden/nvauto] [--case ../shared/cases/isles22_0009] [--packed]
    python -m benchmarks.nvauto_speed --full-size [--precision fp32] [--device auto]

The recorded times are of one thread on two busy cores. The full size is MONAI's SegResNet with 32 filters (blocks 1, 2, 2, 4 and 1, 1, 1)
and random weights, needs MONAI for its shapes, and takes some 100 s of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.memory import peak_mb
from ensemble.families.base import InferenceSettings
from ensemble.families.nvauto.member import BLENDING, CHANNELS, WINDOW, NvautoMember
from ensemble.families.nvauto.network import SegResNetConfig, build_segresnet
from ensemble.families.nvauto.processing import ResampleTo1Mm, normalise_channels
from ensemble.families.spec import MemberSpec
from ensemble.families.unet import window_bytes
from ensemble.inference.device import describe_device, resolve_device
from ensemble.inference.engine import SlidingWindowConfig, sliding_window_inference
from ensemble.inference.precision import resolve_precision
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_openvino import open_openvino_session
from ensemble.inference.session_torch import TorchSession
from ensemble.members.pack import pack_members
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
T = TypeVar("T")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.full_size:
        _full_size(options)
    else:
        _stages(options)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the CPU seconds that it took."""
    started = time.process_time()
    return work(), time.process_time() - started


def _stages(options: argparse.Namespace) -> None:
    (record,) = (options.golden / "outputs" / options.case.name).glob("timings_stats.json")
    theirs = json.loads(record.read_text())
    images = {modality: options.case / f"{modality}.nii.gz" for modality in (Modality.DWI, Modality.ADC)}
    case = prepare_raw(read_case_files(options.case.name, images))
    respacing = ResampleTo1Mm.of(case.grid)
    stacked = torch.from_numpy(np.stack([case.as_read[modality].array.transpose() for modality in CHANNELS]))
    settings = InferenceSettings(allow_torchscript=not options.packed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.golden / "weights" / "NVAUTO" / "ts"
        if options.packed:
            (folder,) = pack_members(folder, Path(scratch) / "packed", "fp32")
        member = NvautoMember.load(MemberSpec("nvauto", "nvauto", folder), settings)
    image, spent = _timed(lambda: normalise_channels(respacing.forward(stacked)))
    print(f"preprocess      {spent:6.1f} s   peer {theirs['preprocess']:6.1f} s")
    how = SlidingWindowConfig(WINDOW, blending=BLENDING)
    for number, session in enumerate(member.sessions):
        peer = theirs[f"model{number}"]
        logits, spent = _timed(partial(sliding_window_inference, image, [session], how))
        print(f"model{number} windows  {spent:6.1f} s   peer {peer['sliding_s']:6.1f} s   ({session.arithmetic})")
        _, spent = _timed(partial(respacing.back, logits.softmax(0)))
        print(f"model{number} back     {spent:6.1f} s   peer {peer['invert_s']:6.1f} s")
    print(f"peak resident memory {peak_mb():.0f} MB")


def _full_size(options: argparse.Namespace) -> None:
    from monai.networks.nets import SegResNet

    with torch.device("meta"):
        like = SegResNet(spatial_dims=3, init_filters=32, in_channels=2, out_channels=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
    form = SegResNetConfig(
        "SegResNet", "group", 8, 1e-5, "relu", 0.0, "linear", ((2, 2, 2),) * 3, channels=2, features=32
    )
    network = build_segresnet(form, shapes).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    device = torch.device(resolve_device(options.device))
    precision = resolve_precision(options.precision, device)
    session: LoadedSession | None = None
    if device.type == "cpu":
        session = open_openvino_session(network, 2, form.smallest_window, precision)
    session = session or TorchSession(network, dims=3, device=device, precision=precision)
    count = sum(parameter.numel() for parameter in network.parameters())
    windows, before = torch.randn(1, 2, *WINDOW), peak_mb()
    wall = time.perf_counter()
    answer, spent = _timed(lambda: session(windows))
    assert answer.shape == (1, 2, *WINDOW)
    print(f"{count / 1e6:.1f} million parameters on {describe_device(str(device))}, {session.arithmetic}")
    print(f"a window: {spent:.1f} CPU s, {time.perf_counter() - wall:.1f} s")
    print(
        f"peak resident memory {peak_mb():.0f} MB, {before:.0f} MB before;"
        f" a window is counted as {window_bytes(WINDOW, form.features) / 2**20:.0f} MB"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=SHARED / "golden" / "nvauto")
    parser.add_argument("--case", type=Path, default=SHARED / "cases" / "isles22_0009")
    parser.add_argument("--packed", action="store_true", help="the networks as members pack writes them")
    parser.add_argument("--full-size", action="store_true", help="one window of a large network with random weights")
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
