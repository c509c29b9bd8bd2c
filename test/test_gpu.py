"""The way of a case over a GPU gives what the CPU gives: on a real one where there is one, else on a pretended one (`pretend_gpu.py`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ensemble.cli import main
from ensemble.families.base import InferenceSettings, Member
from ensemble.families.nnunet_v1.member import NnunetV1Member
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MemberSpec
from ensemble.inference import capacity, engine
from ensemble.inference.device import reproducible_arithmetic
from ensemble.inference.engine import Averaging, MirrorMode, SlidingWindowConfig
from ensemble.inference.session_torch import TorchSession
from ensemble.metrics import dice
from ensemble.prepare import hdbet_unet, skull
from ensemble.types import Modality, ignore_progress
from ensemble.weights import checkpoints
from nnunet_folders import FolderSpec, build_folder, small_case
from nnunet_v1_folders import V1Spec, build_v1_folder
from pretend_gpu import PretendGpu
from test_member_nnunet import TWO_D
from test_sample import IMAGES
from test_session_openvino import unet

#: Of the answers' range; float16 has 11 binary digits, bfloat16 8.
TOLERANCE = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05}


@dataclass(frozen=True)
class Gpu:
    """Where code is run as on a machine with a GPU."""

    pretended: PretendGpu | None

    def __call__(self) -> AbstractContextManager[object]:
        return self.pretended or nullcontext()

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda if self.pretended is None else self.pretended.holds(tensor)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if torch.cuda.is_available():
        yield Gpu(None)
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
    yield Gpu(PretendGpu())


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with PretendGpu() as pretended:
        here, there = torch.ones(4), torch.ones(4, device="cuda")
        assert [pretended.holds(tensor) for tensor in (here, there, there + 1, there[1:], there.cpu())] == [
            *(False, True, True, True, False)
        ]
        assert str(there.device) == "cuda"
        assert pretended.holds(here.to(there))
        assert pretended.holds(there + here.sum())
        for mistake in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here.mul_(there),
            lambda: torch.nn.Linear(4, 2)(there),
            lambda: there.numpy(),
            lambda: here + there.sum(),
            lambda: there.sum().numpy(),
            lambda: np.asarray(there),
        ):
            with pytest.raises((RuntimeError, TypeError), match="cuda|device"):
                mistake()


@pytest.mark.parametrize("buffers", ["cuda", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("kind", "norm", "dims"),
    [
        ("PlainConvUNet", "InstanceNorm", 3),
        ("PlainConvUNet", "BatchNorm", 2),
        ("ResidualEncoderUNet", "BatchNorm", 3),
        ("ResidualEncoderUNet", "InstanceNorm", 2),
    ],
)
@pytest.mark.slow
def test_windows(gpu: Gpu, kind: str, norm: str, dims: int, precision: Any, buffers: str) -> None:
    network = unet(kind, dims, norm)
    image = torch.randn((3, 4, 24, 20) if dims == 2 else (3, 20, 24, 20), generator=torch.Generator().manual_seed(3))
    window, axes = ((1, 16, 16), (1, 2)) if dims == 2 else ((16, 16, 16), (0, 2))
    for tta, average in ((MirrorMode.MIRROR, Averaging.LOGITS), (MirrorMode.GATED, Averaging.PROBABILITIES)):
        how = SlidingWindowConfig(window, axes, tta, average, batch_size=3)
        plain = TorchSession(copy.deepcopy(network), dims=dims, device="cpu", precision="fp32")
        expected = engine.sliding_window_inference(image, [plain, plain], how)
        with gpu():
            session = TorchSession(copy.deepcopy(network), dims=dims, device="cuda", precision=precision)
            assert all(gpu.holds(tensor) for tensor in session.network.state_dict().values() if tensor.ndim)
            answer = engine.sliding_window_inference(image.to(buffers), [session, session], how)
            assert gpu.holds(answer) == (buffers == "cuda")
            given = answer.cpu()
        assert float((given - expected).abs().max()) <= TOLERANCE[precision] * float(expected.abs().max())


def test_what_does_not_fit_is_gathered_on_the_cpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet("PlainConvUNet", 3)
    image, how = torch.randn(3, 20, 24, 20), SlidingWindowConfig((16, 16, 16), batch_size=4)
    expected = engine.sliding_window_inference(image, [TorchSession(copy.deepcopy(network), dims=3, device="cpu")], how)
    refused = []

    class Full(TorchSession):
        def __call__(self, windows: torch.Tensor) -> torch.Tensor:
            if gpu.holds(windows) or len(windows) > 1:
                refused.append(len(windows))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(windows)

    with gpu():
        answer = engine.sliding_window_inference(
            image.to("cuda"), [Full(network, dims=3, device="cuda", precision="fp32")], how
        )
        assert gpu.holds(answer)
        given = answer.cpu()
    assert refused == [4, 2, 1, 4, 2]  # with the image on the GPU, then with it on the CPU
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert capacity.buffer_device(501, torch.device("cuda")).type == "cpu"
    assert capacity.buffer_device(499, torch.device("cuda")).type == "cuda"


MEMBERS = {
    "two folds": FolderSpec(folds=("0", "1")),
    "2-D": FolderSpec(**TWO_D),
    "residual encoder": FolderSpec(network="ResidualEncoderUNet"),
    "batch normalisation": FolderSpec(norm="batchnorm.BatchNorm"),
    "seals": V1Spec(),
}


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["mirror", "gated", "none"])
@pytest.mark.parametrize("name", MEMBERS)
def test_members(gpu: Gpu, name: str, tta: Any, tmp_path: Path) -> None:
    spec = MEMBERS[name]
    case = small_case((22, 40, 36), (2.0, 2.0, 2.0))

    def member(settings: InferenceSettings) -> Member:
        if isinstance(spec, V1Spec):
            return NnunetV1Member.load(MemberSpec("m", "seals", folder), settings)
        return NnunetV2Member.load(MemberSpec("m", "nnunet", folder), settings)

    folder = build_v1_folder(tmp_path, spec) if isinstance(spec, V1Spec) else build_folder(tmp_path, spec)
    on_cpu = InferenceSettings(tta=tta, precision="fp32")
    expected = member(on_cpu).predict(case, on_cpu, ignore_progress)
    with gpu():
        settings = InferenceSettings(device="cuda", tta=tta)
        given = member(settings).predict(case, settings, ignore_progress)
    assert given.arithmetic == "fp16"
    assert expected.mask.array.any()
    assert np.abs(given.probability.array - expected.probability.array).mean() < 1e-3
    assert dice(expected.mask.array, given.mask.array) >= 0.995


@pytest.mark.slow
def test_a_case_from_files_to_report(gpu: Gpu, tmp_path: Path) -> None:
    images = {modality.value: next((IMAGES / f"{modality.value}-brain-mri").iterdir()) for modality in Modality}
    arguments = ["run", *(word for name, path in images.items() for word in (f"--{name}", str(path))), "--tta", "none"]
    masks = {}
    for device, where in (("cpu", nullcontext()), ("cuda", gpu())):
        out = tmp_path / device
        with where:
            assert main([*arguments, "--device", device, "--members", "slice2d,flair3d", "--out", str(out)]) == 0
        masks[device] = sitk.GetArrayFromImage(sitk.ReadImage(str(next(out.glob("mask*")))))
        report = json.loads((out / "report.json").read_text())
        assert ("GPU" in report["device"] or "CUDA" in report["device"]) == (device == "cuda")
        assert {member["arithmetic"] for member in report["members"]} == {
            "fp16" if device == "cuda" else "fp32, OpenVINO"
        }
    assert masks["cpu"].any()
    assert dice(masks["cpu"], masks["cuda"]) >= 0.99


def test_the_skull_is_stripped_there(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Small(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__(torch.nn.Conv3d(1, 2, 1))
            self[0].weight.data[:, 0, 0, 0, 0] = torch.tensor([0.0, 5.0])
            self[0].bias.data.zero_()

    monkeypatch.setattr(hdbet_unet, "HdBetUnet", Small)
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(checkpoints, "load_weights", lambda network, weights, path: None)
    monkeypatch.setattr(skull, "_checkpoint", lambda: tmp_path)
    dwi = next(iter(small_case((22, 40, 36), (2.0, 2.0, 2.0)).images.values()))
    expected = skull._brain_probability(dwi, "cpu")
    with gpu():
        given = skull._brain_probability(dwi, "cuda")
    assert expected.any()
    assert dice(expected, given) >= 0.99


def test_float32_on_a_gpu_is_float32_not_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with reproducible_arithmetic(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == before


def test_networks_run_without_tf32(gpu: Gpu) -> None:
    """The session itself enters it: the network sees the flags."""
    seen: list[bool] = []

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Conv3d(1, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return self.weight(x)

    with gpu():
        session = TorchSession(Watching(), dims=3, device="cuda", precision="fp32")
        session(torch.zeros(1, 1, 8, 8, 8, device="cuda"))
    assert seen == [False]


@pytest.mark.slow
def test_the_one_command_for_a_gpu(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes on a pretended GPU: what works is measured and compared, what doesn't says why, and the file is whole."""
    from benchmarks import gpu as benchmark

    if gpu.pretended is not None:
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
        monkeypatch.setattr(benchmark, "machine", lambda: {"gpu": "pretended"})
    network = (lambda: unet("PlainConvUNet", 3, "InstanceNorm"), (1, 3, 16, 16, 16))
    monkeypatch.setattr(benchmark, "_networks", lambda: {"small": network})
    monkeypatch.setitem(benchmark.CANDIDATES, "broken", lambda build, window: 1 / 0)  # type: ignore[arg-type]
    monkeypatch.setitem(benchmark.PARTS, "ensemble", lambda options, left: __import__("no_such_package"))  # type: ignore[arg-type]
    out = tmp_path / "gpu.json"
    command = [
        "--out",
        str(out),
        "--only",
        "windows,ensemble",
        "--candidates",
        "fp32,fp16,bf16,channels_last_3d,broken",
    ]
    with gpu():
        assert benchmark.main(command) == 0
    found = json.loads(out.read_text())
    rows = found["windows"]["small"]
    assert rows["fp32"]["difference"] == 0
    assert all(0 < rows[name]["difference"] < 0.05 for name in ("fp16", "bf16"))
    assert rows["broken"]["failed"].startswith("ZeroDivisionError")
    assert found["ensemble"] == {"skipped": "not installed: No module named 'no_such_package'"}
    assert benchmark.entered(lambda: 1, ends=0.0)["skipped"].startswith("no time")


def test_the_one_command_says_so_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu as benchmark

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert benchmark.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
