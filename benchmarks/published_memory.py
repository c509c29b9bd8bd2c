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

import numpy as np
import torch

from benchmarks.memory import peak_mb
from benchmarks.swan_full_size import TEST, WIDTHS
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.geometry import Grid
from ensemble.inference.device import describe_device, resolve_device
from ensemble.members.manifest import find_members
from ensemble.members.pack import pack
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback, ignore_progress
from ensemble.volume import Volume

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
        weights = _write_weights(Path(scratch) / "weights")
        if options.packed:
            pack(weights, weights := Path(scratch) / "packed", "fp32")
        before, started = peak_mb(), time.perf_counter()
        members = [family_of(spec).load(spec, settings) for spec in find_members(weights)]
        print(f"{', '.join(f'{count} of {name}' for name, count in NETWORKS.items())} on {describe_device(device)}")
        print(
            f"loaded in {time.perf_counter() - started:.0f} s: peak {peak_mb():.0f} MB, {before:.0f} MB before",
            flush=True,
        )
        case = _made_case()
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


def _write_weights(root: Path) -> Path:
    """DeepISLES' archive in full size; folds and numbers beyond the first are links to it."""
    sys.path.insert(0, str(TEST))
    from monai.networks.nets import SegResNet

    from nnunet_v1_folders import PUBLISHED as SEALS
    from nnunet_v1_folders import V1Spec, build_v1_folder
    from nvauto_files import PUBLISHED as NVAUTO
    from nvauto_files import save_script
    from swan_folders import PUBLISHED as SWAN
    from swan_folders import build_swan_folder

    cube = V1Spec(patch=(128, 128, 128), pools=((2, 2, 2),) * 5, kernels=((3, 3, 3),) * 6, features=32)
    build_v1_folder(root / SEALS, cube)
    for fold in range(1, NETWORKS["seals"]):
        (root / SEALS / f"fold_{fold}").symlink_to("fold_0")
    network = SegResNet(spatial_dims=3, init_filters=32, in_channels=2, out_channels=2)
    save_script(network, root / NVAUTO / "model0.ts")
    for number in range(1, NETWORKS["nvauto"]):
        (root / NVAUTO / f"model{number}.ts").symlink_to("model0.ts")
    build_swan_folder(root / SWAN, folds=("0",), widths=WIDTHS)
    for fold in range(1, NETWORKS["swan"] // 2):
        (root / SWAN / f"fold{fold}").symlink_to("fold0")
    return root


def _made_case() -> PreparedCase:
    z, y, x = SHAPE
    grid = Grid((x, y, z), (SPACING_MM,) * 3, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    generator = np.random.default_rng(0)
    images = {m: Volume(generator.uniform(1, 2, SHAPE).astype(np.float32), grid) for m in Modality}
    return PreparedCase(
        "made up", images, images, images, images[Modality.DWI].like(images[Modality.DWI].array > 0), ()
    )


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
