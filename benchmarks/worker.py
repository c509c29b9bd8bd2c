"""A process that answers "go" on stdin with one timed run from files to mask; see `engines.py`. One engine a process, so that neither
shares the other's memory settings, caches or imports.

    python -m benchmarks.worker JOB.json      # {"engine": ..., "threads": n, ...}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_mb

Run = Callable[[Path], dict[str, float]]


def main() -> None:
    """Load, say so, then a run a line: each writes its mask to the path it is given."""
    job = json.loads(Path(sys.argv[1]).read_text())
    # wherever the libraries want to talk, stdout is for answers
    answers, sys.stdout = sys.stdout, sys.stderr
    before = time.process_time(), time.time()
    run, stages = _ENGINES[job["engine"]](job)
    stages |= {"start cpu": time.process_time(), "load cpu": time.process_time() - before[0]}
    print(json.dumps({"stages": stages} | _peak()), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        stages = run(Path(line.strip()))
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "stages": stages}
        print(json.dumps(spent | _peak()), file=answers, flush=True)


def _peak() -> dict[str, float]:
    return {"peak_mb": peak_mb()}


def _ours(job: Mapping[str, Any]) -> tuple[Run, dict[str, float]]:
    """The shipped pipeline with the members named."""
    from ensemble.memory import keep_freed_memory

    keep_freed_memory()
    from ensemble.config import RunConfig
    from ensemble.outputs.formats.image import write as write_volume
    from ensemble.pipeline import load_from_config, segment_raw
    from ensemble.progress import SilentWatcher
    from ensemble.readers.imagefile import read_case_files
    from ensemble.types import Modality

    _threads(job["threads"])
    imported = time.process_time()
    members = tuple(job["members"]) if job["members"] else None
    config = RunConfig(Path(job["weights"]), members, job["device"], job["tta"], job["precision"], job["session"])
    ensemble = load_from_config(config)
    loaded = time.process_time()
    files = {Modality(name): Path(path) for name, path in job["files"].items()}

    def run(mask: Path) -> dict[str, float]:
        started = time.process_time()
        raw = read_case_files("benchmark", files)
        read = time.process_time()
        result = segment_raw(raw, ensemble, SilentWatcher())
        segmented = time.process_time()
        write_volume(result.fused.mask, mask)
        return {"read cpu": read - started, **result.seconds, "write cpu": time.process_time() - segmented}

    return run, {"imports cpu": imported, "weights cpu": loaded - imported}


def _nnunet(job: Mapping[str, Any]) -> tuple[Run, dict[str, float]]:
    """nnunetv2's predictor, in one process: its own worker processes would import nnunetv2 anew for every case."""
    import os

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(variable, "unused")
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    _threads(job["threads"])
    imported = time.process_time()
    device = torch.device(job["device"])
    predictor = nnUNetPredictor(
        device=device,
        use_mirroring=job["tta"] == "mirror",
        perform_everything_on_device=device.type == "cuda",
        allow_tqdm=False,
    )
    folder = Path(job["folder"])
    folds = sorted(path.name[5:] for path in folder.glob("fold_*"))
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    loaded = time.process_time()

    def run(mask: Path) -> dict[str, float]:
        target = str(mask).removesuffix(".nii.gz")
        predictor.predict_from_files_sequential([job["channels"]], [target], overwrite=True)
        return {}

    return run, {"imports cpu": imported, "weights cpu": loaded - imported}


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


_ENGINES: Mapping[str, Callable[[Mapping[str, Any]], tuple[Run, dict[str, float]]]] = {
    "ours": _ours,
    "nnunet": _nnunet,
}


if __name__ == "__main__":
    main()
