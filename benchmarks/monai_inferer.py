"""Our engine and MONAI's SlidingWindowInferer on the same TorchScript SegResNet, image, windows and threads, turn by turn.

Both get half-overlapping windows weighed by a Gaussian and no mirroring. MONAI's Gaussian has another width and its windows end
elsewhere, so logits agree inside, not everywhere; the masks of random weights would mean nothing and are not compared.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

IMAGE, WINDOW = (96, 144, 128), (64, 96, 96)


def compare(threads: int, rounds: int, device: str) -> dict[str, Any]:
    """Median seconds of both; `skipped` says why not."""
    if importlib.util.find_spec("monai") is None:
        return {"skipped": "MONAI is not installed (pip install --no-deps monai==1.6.1)"}
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import SegResNet

    from ensemble.inference.engine import SlidingWindowConfig, sliding_window_inference
    from ensemble.inference.session_torch import TorchSession

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = SegResNet(spatial_dims=3, init_filters=16, in_channels=2, out_channels=2).eval()
    script = torch.jit.trace(network, torch.zeros(1, 2, *WINDOW))
    script = torch.jit.freeze(script).to(device)
    image = torch.randn(2, *IMAGE).to(device)
    inferer = SlidingWindowInferer(WINDOW, sw_batch_size=1, overlap=0.5, mode="gaussian", progress=False)
    session = TorchSession(network, dims=3, device=device)

    def monai_run() -> torch.Tensor:
        with torch.inference_mode():
            answer = inferer(image[None], script)
        assert isinstance(answer, torch.Tensor)
        return answer[0]

    def ours_run() -> torch.Tensor:
        return sliding_window_inference(image, [lambda windows: script(windows)], SlidingWindowConfig(WINDOW))

    def ours_session() -> torch.Tensor:
        return sliding_window_inference(image, [session], SlidingWindowConfig(WINDOW))

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "MONAI SlidingWindowInferer": monai_run,
        "ours, same TorchScript": ours_run,
        "ours, TorchSession": ours_session,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    answers = {}
    for turn in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            answers[name] = run()
            if turn or rounds == 1:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    reference = answers["MONAI SlidingWindowInferer"]
    return {
        name: {
            "wall_s": median(wall for wall, _ in spent),
            "cpu_s": median(cpu for _, cpu in spent),
            "mean_difference": float((answers[name] - reference).abs().mean()),
        }
        for name, spent in times.items()
    }
