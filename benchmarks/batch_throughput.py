"""How much of the resident engine's pure rate does a batch keep?

    python -m benchmarks.batch_throughput --work SCRATCH [--cases 12] [--members a,b] [--tta none] [--report]

The same cases, in one process, with the shipped members: first the pure rate, cases prepared in memory and handed to the networks one after
the other (`pipeline.predict`); then a whole batch, reading, checks, networks, writing and summary included, start of the process and
loading of the weights not, since they happen once. Prints both and their ratio; exit code 1 below 0.9.

Wall time means something on an idle machine only. On a loaded one look at CPU seconds: all work of the batch against that of the networks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import patch

from ensemble.batch import run
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.inference.device import describe_device
from ensemble.pipeline import load_from_config, segment_prepared
from ensemble.prepare.case import prepare_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality

_SAMPLE = Path(__file__).resolve().parent.parent / "test" / "sample" / "input" / "images"
LEAST = 0.9


def main() -> None:
    options = _options()
    config = RunConfig(members=options.members, device=options.device, tta=options.tta)
    data, out = options.work / "data", options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    write_copies(data, options.cases)
    ensemble = load_from_config(config)
    case = prepare_raw(read_case_files("sample", sample_files()))
    segment_prepared(case, ensemble, SilentWatcher())  # the first one is slower
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.cases):
        segment_prepared(case, ensemble, SilentWatcher())
    pure, pure_cpu = (time.perf_counter() - wall) / options.cases, (time.process_time() - cpu) / options.cases
    with patch.object(run, "load_from_config", lambda config: ensemble):
        wall, cpu = time.perf_counter(), time.process_time()
        code = run.segment_dataset(data, out, config, ExtraOutputs(report=options.report))
    batch, batch_cpu = (time.perf_counter() - wall) / options.cases, (time.process_time() - cpu) / options.cases
    print(f"{options.cases} copies of the sample case, {describe_device(ensemble.settings.device)}, TTA {config.tta}")
    print(f"networks alone: {pure:.2f} s a case ({pure_cpu:.2f} CPU s)")
    print(f"batch:          {batch:.2f} s a case ({batch_cpu:.2f} CPU s), exit code {code}")
    print(f"rate of the batch / rate of the networks: {pure / batch:.3f} (at least {LEAST})")
    sys.exit(code or int(pure / batch < LEAST))


def sample_files() -> dict[Modality, Path]:
    """Return the images of the sample case."""
    return {modality: next((_SAMPLE / f"{modality}-brain-mri").glob("*.mha")) for modality in Modality}


def write_copies(root: Path, count: int) -> None:
    """Write a dataset of copies of the sample case, in place of what is there."""
    shutil.rmtree(root, ignore_errors=True)
    for number in range(count):
        (root / f"p{number:03d}").mkdir(parents=True)
        for modality, file in sample_files().items():
            shutil.copy(file, root / f"p{number:03d}" / f"{modality}.mha")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="rate of a batch beside that of its networks")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder outside the repository")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--members", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tta", choices=("mirror", "none"), default="none")
    parser.add_argument("--report", action="store_true", help="with picture and page of each case")
    return parser.parse_args()


if __name__ == "__main__":
    main()
