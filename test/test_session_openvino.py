"""Networks on OpenVINO: PyTorch's answer, whatever the network, its window or the number of threads, or PyTorch itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import REPOSITORY
from ensemble.errors import UsageError
from ensemble.families import sessions
from ensemble.families.base import InferenceSettings, NetworkSpec
from ensemble.families.nnunet_v2.network import build_nnunet_v2_network
from ensemble.families.nnunet_v2.plans import Architecture
from ensemble.inference import precision, session_openvino
from ensemble.inference.session_openvino import OpenVinoSession, open_openvino_session
from ensemble.inference.session_torch import TorchSession

CPU = torch.device("cpu")


def unet(kind: str, dims: int, norm: str = "BatchNorm", classes: int = 2) -> nn.Module:
    """A small U-Net as plans name it, with statistics and weights of all sizes."""
    blocks = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}[kind]
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [8, 12, 16],
        "conv_op": f"torch.nn.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * 3,
        "strides": [[1] * dims, [2] * dims, [2] * dims],
        blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [2, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.{norm}{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": f"torch.nn.Dropout{dims}d",
        "dropout_op_kwargs": {"p": 0.5},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    network = build_nnunet_v2_network(
        Architecture(kind, kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin")), 3, classes
    )
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
            if "running_var" in name:
                tensor.abs_().add_(0.3)
            if "norm.weight" in name:
                tensor.add_(1)
    return network.eval()


def windows(dims: int, *sizes: int) -> torch.Tensor:
    """Two of them, (N, C, Z, Y, X)."""
    shape = (1, *(sizes or (16, 16))) if dims == 2 else sizes or (16, 16, 16)
    return torch.randn((2, 3, *shape), generator=torch.Generator().manual_seed(1))


def opened(network: nn.Module, dims: int, precision: str = "fp32") -> OpenVinoSession:
    session = open_openvino_session(network, 3, (8,) * dims, precision)  # type: ignore[arg-type]
    assert session is not None
    return session


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_the_same_answer_for_any_window_and_number_of_threads(norm: str, kind: str, dims: int) -> None:
    network = unet(kind, dims, norm)
    plain, threads, by_threads = TorchSession(network, dims=dims, device="cpu"), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            by_threads.append(opened(network, dims))
    finally:
        torch.set_num_threads(threads)
    for sizes in ((16, 16, 16), (8, 16, 24)):
        inputs = windows(dims, *sizes[:dims]).flip(-1)
        answers = [session(inputs) for session in by_threads]
        torch.testing.assert_close(answers[0], plain(inputs), rtol=1e-5, atol=1e-5)
        assert torch.equal(answers[1], answers[0])
    session = by_threads[0]
    assert session.arithmetic == "fp32, OpenVINO"
    kept = answers[-1].clone()
    session(inputs + 1)
    assert torch.equal(answers[-1], kept), "an answer lies in the session's own memory"


@pytest.mark.parametrize("norm", [nn.InstanceNorm3d(4, affine=True), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4)])
def test_normalisation_over_many_voxels_loses_nothing(norm: nn.Module) -> None:
    """OpenVINO's own is 2e-5 of the range off here: it adds up a map in one float32."""
    network = nn.Sequential(nn.Conv3d(3, 4, 1), norm).eval()
    inputs = windows(3, 56, 64, 64)[:1] * 3 + 1
    with torch.inference_mode():
        given = opened(network, 3)(inputs)
        expected = network.double()(inputs.double())
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=3e-6)


def test_a_network_works_on_all_threads_that_it_may_use() -> None:
    """By the processor time of the threads beside the one that asks; where there is one thread, there are no others."""
    program = """
import os, sys, torch
from ensemble.inference.session_openvino import open_openvino_session
torch.set_num_threads(int(sys.argv[1]))
def others():
    ticks = 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != os.getpid():
            ticks += sum(map(int, open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()[11:13]))
    return ticks
layers = [torch.nn.Conv3d(1, 32, 3, padding=1), torch.nn.Conv3d(32, 32, 3, padding=1), torch.nn.Conv3d(32, 2, 1)]
session = open_openvino_session(torch.nn.Sequential(*layers), 1, (8, 8, 8), "fp32")
before, times = others(), os.times()
for _ in range(3):
    session(torch.zeros(1, 1, 64, 64, 64))
now = os.times()
print((others() - before) / 100 / (now.user + now.system - times.user - times.system))
"""
    shares = [
        float(
            subprocess.run([sys.executable, "-c", program, n], cwd=REPOSITORY, check=True, capture_output=True).stdout
        )
        for n in ("1", "2")
    ]
    assert shares[0] < 0.05
    assert shares[1] > 0.1


def test_the_threads_of_many_networks_are_few() -> None:
    """Platforms allow few, and each network keeps two of its own."""
    program = """
import os, torch
from ensemble.inference import session_openvino
from ensemble.inference.session_openvino import open_openvino_session
torch.set_num_threads(2)
sessions, counts = [], []
session_openvino.MAX_WITH_THREADS = 3
for _ in range(6):
    sessions.append(open_openvino_session(torch.nn.Conv3d(1, 2, 3, padding=1), 1, (8, 8, 8), "fp32"))
    sessions[-1](torch.zeros(1, 1, 16, 16, 16))
    counts.append(len(os.listdir("/proc/self/task")))
assert counts[0] < counts[1] < counts[2] == counts[5], counts
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_the_network_is_left_as_it_was() -> None:
    network = unet("PlainConvUNet", 3, "InstanceNorm")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    opened(network, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any("forward" in vars(layer) for layer in network.modules())
    assert not network._forward_hooks


class Reckons(nn.Module):
    """A network whose answer follows from its window's size: traced, it would be that of one size for good."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return windows[:, :2] * float(windows.mean())


class Bottomless(nn.Module):
    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(windows[:, :2])


@pytest.mark.parametrize("network", [Reckons(), Bottomless()], ids=["reckons with values", "unknown operation"])
def test_what_it_cannot_run_pytorch_runs(network: nn.Module, caplog: pytest.LogCaptureFixture, tmp_path) -> None:
    description = NetworkSpec(tmp_path / "w", 3, (2.0,) * 3, (8,) * 3, (8,) * 3, 2**20, "", lambda: network)
    for asked in ("fp32", "bf16"):
        session = sessions.open_session(description, InferenceSettings(precision=asked))  # type: ignore[arg-type]
        assert isinstance(session, TorchSession)
        assert session.arithmetic == "fp32"
        assert "using PyTorch in float32" in caplog.text
        torch.testing.assert_close(session(windows(3)), network(windows(3)))


@pytest.mark.parametrize("why", ["wrong", "missing"])
def test_a_network_that_answers_otherwise_or_no_openvino(why: str, monkeypatch, caplog) -> None:
    def wrong(onnx: bytes, **how: object) -> object:
        right = OpenVinoSession(onnx, **how)  # type: ignore[arg-type]
        return lambda windows: right(windows) + 2e-4 * right(windows).abs().max()

    if why == "wrong":
        monkeypatch.setattr(session_openvino, "OpenVinoSession", wrong)
    else:
        session_openvino._core.cache_clear()
        monkeypatch.setitem(sys.modules, "openvino", None)
    assert open_openvino_session(unet("PlainConvUNet", 2), 3, (8, 8), "fp32") is None
    assert "using PyTorch" in caplog.text


def test_memory_that_ran_out_is_no_reason_for_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("could not create a memory object")

    monkeypatch.setattr(session_openvino, "OpenVinoSession", full)
    with pytest.raises(RuntimeError, match="memory"):
        open_openvino_session(unet("PlainConvUNet", 2), 3, (8, 8), "fp32")


@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_bfloat16_is_close_and_only_on_request(norm: str) -> None:
    network, inputs = unet("PlainConvUNet", 3, norm), windows(3)
    exact, coarse = opened(network, 3)(inputs), opened(network, 3, "bf16")
    if coarse.arithmetic == "fp32, OpenVINO":
        pytest.skip("this processor has no bfloat16")
    assert coarse.arithmetic == "bf16, OpenVINO"
    given = coarse(inputs)
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert float((given - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_precision_by_device_and_mirroring(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = InferenceSettings()
    for fast in (False, True):
        monkeypatch.setattr(sessions, "has_fast_bfloat16", lambda device, fast=fast: fast and device.type == "cpu")
        assert sessions.precision_of(settings) == "fp32"
        assert sessions.precision_of(replace(settings, tta="gated")) == ("bf16" if fast else "fp32")
        assert sessions.precision_of(replace(settings, tta="gated", precision="fp32")) == "fp32"
        assert sessions.precision_of(replace(settings, precision="bf16")) == "bf16"
        assert sessions.precision_of(replace(settings, device="cuda", tta="gated")) == "fp16"
        assert sessions.precision_of(replace(settings, device="cuda", precision="bf16")) == "bf16"
    with pytest.raises(UsageError, match="fp16"):
        sessions.precision_of(replace(settings, precision="fp16"))
    assert not precision.has_fast_bfloat16(torch.device("cuda"))


def test_nothing_is_told_to_its_makers() -> None:
    """`import openvino` imports openvino_telemetry, where that is installed, and that looks for a server."""
    program = """
import sys
reached = []
sys.addaudithook(lambda event, arguments: reached.append((event, arguments)) if event.startswith("socket.") else None)
import torch
from ensemble.inference.session_openvino import open_openvino_session
session = open_openvino_session(torch.nn.Conv3d(1, 2, 3, padding=1), 1, (8, 8, 8), "fp32")
assert session.arithmetic.endswith("OpenVINO")
session(torch.zeros(1, 1, 8, 8, 8))
assert not reached, reached
told = [name for name in sys.modules if "telemetry" in name or name.startswith("openvino.tools")]
assert not [name for name in told if not name.startswith("opentelemetry")], told
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
