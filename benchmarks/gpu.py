"""All that is to be known of one GPU, in one command: offline, in under 8 minutes, into one JSON file.

    python -m benchmarks.gpu [--out FILE] [--minutes 8] [--only tests,windows,...] [--candidates fp32,fp16,...] [--threads N]

tests      test/test_gpu.py on the real device
windows    one window of nnU-Net's full-size 3d_fullres network and of the shipped 3-D member, by each of CANDIDATES: milliseconds,
           peak memory, how far its probabilities are from float32's
buffers    whole-image prediction with image and answers (cutting, softmax, accumulation) on the GPU, and on the CPU
ensemble   the shipped ensemble, cold and warm, by stage
busy       the share of a warm case's inference in which the GPU computes
seals      SEALS of the published size, five folds, eight flips
nnunet     side by side with nnUNetPredictor: full-size 3d_fullres, five folds, eight flips

What isn't installed, fails, or finds no time left is entered with the reason. Exit code 2 without a GPU, 1 when a part failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import __main__ as tables
from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.families.registry import family_of
from ensemble.inference.device import reproducible_arithmetic
from ensemble.inference.engine import SlidingWindowConfig, sliding_window_inference
from ensemble.inference.export import export_to_onnx
from ensemble.inference.parity import foreground_probability
from ensemble.inference.session import Session
from ensemble.inference.session_onnx import OnnxSession
from ensemble.inference.session_torch import TorchSession
from ensemble.members.manifest import find_members

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "test" / "sample" / "input" / "images"
Build = Callable[[], torch.nn.Module]
Window = tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts in turn; the file is written anew after each, so that nothing measured is lost."""
    options = _options(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    for part in options.only:
        found[part] = entered(partial(PARTS[part], options, ends - time.monotonic()), ends)
        print(part, json.dumps(found[part]), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("failed" in result for result in found.values() if isinstance(result, dict)))


def entered(run: Callable[[], Any], ends: float) -> Any:
    """What a part or candidate gives; why it gave nothing."""
    if time.monotonic() > ends:
        return {"skipped": "no time was left (--minutes, --only)"}
    try:
        return run()
    except ImportError as error:
        return {"skipped": f"not installed: {error}"}
    except Exception as error:  # each is tried for the first time here: whatever one raises is its result
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def machine() -> dict[str, Any]:
    """What was measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "memory_mb": properties.total_memory / 2**20,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


# -- candidates: a network and its window, to something that answers windows ------------------------------------------------------------


def _as(precision: Any) -> Callable[[Build, Window], Session]:
    return lambda build, window: TorchSession(build(), dims=3, device="cuda", precision=precision)


def _channels_last(build: Build, window: Window) -> Session:
    session = TorchSession(build(), dims=3, device="cuda", precision="fp16")
    session.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return lambda windows: session(windows.contiguous(memory_format=torch.channels_last_3d))


def _compiled(build: Build, window: Window) -> Session:
    """PyTorch's compiler: its Triton kernels put instance normalisation and leaky ReLU together."""
    import_module("triton")  # without it the compiler falls back, and nothing is learned
    session = TorchSession(build(), dims=3, device="cuda", precision="fp16")
    session.network = torch.compile(session.network)  # type: ignore[assignment]
    return session


def _graph(build: Build, window: Window) -> Session:
    """The window's kernels recorded once, and started together."""
    session = TorchSession(build(), dims=3, device="cuda", precision="fp16")
    held = torch.zeros(window, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            session(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = session(held)

    def run(windows: torch.Tensor) -> torch.Tensor:
        held.copy_(windows)
        graph.replay()
        return answer.clone()

    return run


def _onnx(engine: Any, provider: str) -> Callable[[Build, Window], Session]:
    def make(build: Build, window: Window) -> Session:
        import onnxruntime

        if provider not in onnxruntime.get_available_providers():
            raise ImportError(f"ONNX Runtime has no {provider}")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "network.onnx"
            path.write_bytes(export_to_onnx(build().eval(), window[1], (64, 64, 64)).onnx)
            session = OnnxSession(path, dims=3, device="cuda", engine=engine)
        if provider not in session.arithmetic:
            raise ImportError(f"{provider} can't be loaded, {session.arithmetic} would run")
        return session

    return make


CANDIDATES: Mapping[str, Callable[[Build, Window], Session]] = {
    "fp32": _as("fp32"),
    "fp16": _as("fp16"),
    "bf16": _as("bf16"),
    "channels_last_3d": _channels_last,
    "cuda_graph": _graph,
    "torch_compile": _compiled,
    "onnxruntime_cuda": _onnx("onnx", "CUDAExecutionProvider"),
    "tensorrt": _onnx("tensorrt", "TensorrtExecutionProvider"),
}


def measured(
    make: Callable[[Build, Window], Session], build: Build, window: Window, rounds: int = 10
) -> dict[str, Any]:
    """A candidate's preparation, its time a window, its peak memory, and its foreground's probability (kept for comparison)."""
    torch.cuda.reset_peak_memory_stats()
    windows = torch.randn(window, generator=torch.Generator().manual_seed(0)).to("cuda")
    started = time.perf_counter()
    session = make(build, window)
    with torch.inference_mode(), reproducible_arithmetic(torch.device("cuda")):
        answer = session(windows)
        torch.cuda.synchronize()
        prepared, spent = time.perf_counter() - started, []
        for _ in range(rounds):
            started = time.perf_counter()
            session(windows)
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - started)
    return {
        "prepare_s": prepared,
        "window_ms": 1000 * median(spent),
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
        "probability": foreground_probability(answer).cpu(),
    }


def compared(networks: Mapping[str, tuple[Build, Window]], candidates: Sequence[str], ends: float) -> dict[str, Any]:
    """By network and candidate what `measured` says, with the largest difference of a probability from float32's."""
    found: dict[str, Any] = {}
    for name, (build, window) in networks.items():
        results = {}
        for candidate in candidates:
            results[candidate] = entered(partial(measured, CANDIDATES[candidate], build, window), ends)
        given = {key: result.pop("probability") for key, result in results.items() if "probability" in result}
        for key, probability in given.items():
            if "fp32" in given:
                results[key]["difference"] = float((probability - given["fp32"]).abs().max())
        found[name] = results
    return found


# -- parts ------------------------------------------------------------------------------------------------------------------------------


def _tests(options: argparse.Namespace, left: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "test/test_gpu.py"]
    return _said(command, left)


def _windows(options: argparse.Namespace, left: float) -> dict[str, Any]:
    return compared(_networks(), options.candidates, time.monotonic() + left)


def _networks() -> dict[str, tuple[Build, Window]]:
    with tempfile.TemporaryDirectory() as scratch:
        (large,) = find_members(tables.full_size_folder(Path(scratch), folds=("0",)).parent)
        (network,) = family_of(large).networks(large.folder)
        full = network.build()
    (small,) = find_members(SHIPPED_WEIGHTS, ("iso3d",))
    (shipped,) = family_of(small).networks(small.folder)
    return {
        "full size": (partial(copy.deepcopy, full), (1, network.channels, *network.patch)),
        "iso3d": (shipped.build, (1, shipped.channels, *shipped.patch)),
    }


def _buffers(options: argparse.Namespace, left: float) -> dict[str, Any]:
    build, (_, channels, *patch) = _networks()["iso3d"]
    session = TorchSession(build(), dims=3, device="cuda")
    image = torch.randn(channels, *(2 * n for n in patch))
    how = SlidingWindowConfig((patch[0], patch[1], patch[2]), (0, 1, 2), batch_size=8)
    seconds = {}
    for device in ("cuda", "cpu"):
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            sliding_window_inference(image.to(device), [session], how)
            torch.cuda.synchronize()
            seconds[f"{device}_s"] = time.perf_counter() - started
    return seconds


def _ensemble(options: argparse.Namespace, left: float) -> Any:
    return tables.ensemble_rows(_tables(options, rounds=3), Path(tempfile.mkdtemp()))


def _nnunet(options: argparse.Namespace, left: float) -> Any:
    return tables.full_size_rows(_tables(options, rounds=2), Path(tempfile.mkdtemp()))


def _tables(options: argparse.Namespace, rounds: int) -> argparse.Namespace:
    given = tables.parse(["--device", "cuda", "--rounds", str(rounds), "--threads", str(options.threads)])
    given.files = {"sample": sample()}
    return given


def _seals(options: argparse.Namespace, left: float) -> dict[str, Any]:
    return _said([sys.executable, "-m", "benchmarks.seals_full_size", "--device", "cuda", "--tta", "mirror"], left)


def _busy(options: argparse.Namespace, left: float) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    from ensemble.pipeline import load_from_config, segment_raw
    from ensemble.progress import SilentWatcher
    from ensemble.readers.imagefile import read_case_files

    ensemble, raw = load_from_config(RunConfig(device="cuda")), read_case_files("sample", sample())
    for _ in range(2):
        segment_raw(raw, ensemble, SilentWatcher())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = segment_raw(raw, ensemble, SilentWatcher())
        torch.cuda.synchronize()
    inference = sum(seconds for stage, seconds in result.seconds.items() if stage.startswith("member"))
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return {"inference_s": inference, "busy_s": busy, "share": busy / inference}


def sample() -> dict[Any, Path]:
    """The sample case, which the repository holds: its images by modality."""
    from ensemble.types import Modality

    return {modality: next((SAMPLE / f"{modality.value}-brain-mri").glob("*.mha")) for modality in Modality}


def _said(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a program of its own prints. Raises RuntimeError where it fails, TimeoutExpired where it takes longer."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-400:])
    return {"said": done.stdout.strip().splitlines()}


PARTS: Mapping[str, Callable[[argparse.Namespace, float], Any]] = {
    "tests": _tests,
    "windows": _windows,
    "buffers": _buffers,
    "ensemble": _ensemble,
    "busy": _busy,
    "seals": _seals,
    "nnunet": _nnunet,
}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="one GPU's figures as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, known in (("--only", PARTS), ("--candidates", CANDIDATES)):
        parser.add_argument(name, type=lambda text: text.split(","), default=list(known), help=",".join(known))
    options = parser.parse_args(arguments)
    if unknown := (set(options.only) - set(PARTS)) | (set(options.candidates) - set(CANDIDATES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
