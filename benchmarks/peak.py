"""How near to the processor's limit the shipped members' networks run in float32: `python -m benchmarks.peak [--threads 1]`.

For each network one window: its operations (multiplications and additions of convolutions, counted by PyTorch), the CPU seconds that
PyTorch and OpenVINO take, and the rate of a large matrix product in float32, which no direct convolution exceeds. The last column is the
smallest share of PyTorch's time that a runtime at that rate would need. Weights are random: they change neither.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemble.inference.session_openvino import open_openvino_session
from ensemble.inference.session_torch import TorchSession
from training.members import MEMBERS, build_network

MATRIX = 3072
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description="rate of the shipped networks against that of a matrix product, in float32"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    square = torch.randn(MATRIX, MATRIX)
    limit = 2 * MATRIX**3 / seconds(lambda: square @ square)
    print(f"{options.threads} threads; matrix product {limit / 1e9:.0f} GFLOP a CPU second")
    for spec in MEMBERS.values():
        network = build_network(spec).eval()
        windows = torch.rand(1 if spec.dimensions == 3 else 16, len(spec.channels), *spec.patch[-3:])
        if spec.dimensions == 2:
            windows = windows.unsqueeze(2)
        plain = TorchSession(network, dims=spec.dimensions, device="cpu")
        converted = open_openvino_session(network, len(spec.channels), (32,) * spec.dimensions, "fp32")
        assert converted is not None, "OpenVINO refuses the network"
        with FlopCounterMode(display=False) as counter:
            plain(windows)
        work = counter.get_total_flops()
        torch_s, openvino_s = seconds(partial(plain, windows)), seconds(partial(converted, windows))
        print(
            f"{spec.name}: {work / 1e9:.0f} GFLOP; PyTorch {torch_s:.2f} CPU s ({work / torch_s / limit:.2f} of the limit), "
            f"OpenVINO {openvino_s:.2f} ({work / openvino_s / limit:.2f}), {openvino_s / torch_s:.2f} of PyTorch's time; "
            f"at the limit {work / limit / torch_s:.2f}",
            flush=True,
        )


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of some rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


if __name__ == "__main__":
    main()
