"""The fused form of networks on the CPU: the same function, whatever the network, its window or the number of threads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ensemble.errors import UsageError
from ensemble.families.nnunet_v2.network import build_network
from ensemble.families.nnunet_v2.plans import Architecture
from ensemble.inference import session_torch
from ensemble.inference.fused import (
    FusedConvolution,
    InstanceNormalisation,
    MeanPool,
    _moments,
    fuse_layers,
    in_precision,
    replace_pools,
)
from ensemble.inference.precision import has_bfloat16, has_fast_bfloat16, resolve_precision
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
    network = build_network(Architecture(kind, kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin")), 3, classes)
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


def windows(dims: int, count: int = 2) -> torch.Tensor:
    return torch.randn((count, 3, *[16] * dims), generator=torch.Generator().manual_seed(1))


def layout(dims: int) -> torch.memory_format:
    return torch.channels_last_3d if dims == 3 else torch.channels_last


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
@torch.inference_mode()
def test_fused_is_the_same_function(norm: str, kind: str, dims: int) -> None:
    network, inputs = unet(kind, dims, norm), windows(dims)
    before = copy.deepcopy(network.state_dict())
    expected, fused = network(inputs), fuse_layers(network)
    assert fused is not None
    norms = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    assert not [layer for layer in fused.modules() if isinstance(layer, norms)]
    assert any(isinstance(layer, FusedConvolution) for layer in fused.modules())
    given = fused(inputs.contiguous(memory_format=layout(dims)))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items()), "it was changed"
    # the check can fail
    next(layer for layer in network.modules() if isinstance(layer, norms)).eps = 0.1
    assert not torch.allclose(network(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4, track_running_stats=True)),
        nn.Sequential(nn.Conv3d(3, 4, 3, padding="same"), nn.ReLU()),
        nn.Sequential(nn.Conv3d(3, 4, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.BatchNorm3d(4)),
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2)),
        nn.Identity(),
    ],
    ids=[
        "group norm",
        "instance norm with statistics of its own",
        "padding by name",
        "mirrored padding",
        "norm after activation",
        "norm of the batch",
        "overlapping pool",
        "none",
    ],
)
def test_what_cannot_be_fused_is_left_alone(network: nn.Module) -> None:
    assert fuse_layers(network) is None


@torch.inference_mode()
def test_activations_other_than_leaky_relu() -> None:
    for activation in (nn.ReLU(), nn.GELU(), nn.SiLU()):
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 2, 1)
        ).eval()
        inputs = windows(2)
        fused = fuse_layers(network)
        assert fused is not None
        torch.testing.assert_close(fused(inputs.contiguous(memory_format=torch.channels_last)), network(inputs))


@torch.inference_mode()
def test_a_mean_before_a_convolution_becomes_part_of_it() -> None:
    for stride in ((2, 2, 2), (1, 2, 2)):
        network = nn.Sequential(
            nn.AvgPool3d(stride, stride), nn.Sequential(nn.Conv3d(3, 16, 1), nn.BatchNorm3d(16)), nn.Conv3d(16, 2, 1)
        ).eval()
        inputs = torch.randn((2, 3, 7, 9, 8), generator=torch.Generator().manual_seed(2))
        fused = fuse_layers(network)
        assert fused is not None
        assert not [layer for layer in fused.modules() if isinstance(layer, MeanPool | nn.AvgPool3d)]
        given = fused(inputs.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(given, network(inputs), rtol=1e-5, atol=1e-5)
    two = nn.Sequential(nn.Conv3d(3, 16, 1), nn.Conv3d(16, 16, 1))
    for left in (nn.Conv3d(3, 16, 1, stride=2), nn.Conv3d(3, 16, 1, padding=1), nn.Conv3d(3, 16, 3), two):
        network = nn.Sequential(nn.AvgPool3d(2, 2), left).eval()
        fused = fuse_layers(network)
        assert fused is not None
        assert [layer for layer in fused.modules() if isinstance(layer, MeanPool)]
        given = fused(inputs.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(given, network(inputs), rtol=1e-5, atol=1e-5)


def test_moments_lose_nothing_over_many_voxels() -> None:
    maps = torch.randn((1, 3, 64, 64, 64), generator=torch.Generator().manual_seed(5)) + 5
    mean, variance = _moments(maps.contiguous(memory_format=torch.channels_last_3d))
    values = maps.double().flatten(2)[0]
    torch.testing.assert_close(mean, values.mean(1), rtol=0, atol=3e-7)
    torch.testing.assert_close(variance, values.var(1, correction=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_instance_normalisation_is_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    maps = torch.randn((1, 16, 48, 48, 48), generator=torch.Generator().manual_seed(7)) * 3 + 4
    layer = InstanceNormalisation(nn.InstanceNorm3d(16), nn.LeakyReLU())
    inputs, threads, answers = maps.to(dtype).contiguous(memory_format=layout(3)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            answers.append(layer(inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("offset", [0.0, 4.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 2, 3), (40, 48, 36), (300, 200), (1, 2)])
@torch.inference_mode()
def test_instance_normalisation(shape: tuple[int, ...], offset: float) -> None:
    """As exact as PyTorch's own, whose sums are float64; also where the mean is many times the deviation."""
    kind = nn.InstanceNorm2d if len(shape) == 2 else nn.InstanceNorm3d
    generator = torch.Generator().manual_seed(4)
    maps = torch.randn((2, 5, *shape), generator=generator) * 3 + offset
    maps[1] -= 7
    for affine, activation in ((True, nn.LeakyReLU(0.1, inplace=True)), (False, None)):
        norm = kind(5, affine=affine)
        if affine:
            norm.weight.copy_(torch.rand(5, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(5, generator=generator))
        ours, theirs = InstanceNormalisation(norm, activation), copy.deepcopy(norm).double()
        act = activation or nn.Identity()
        expected = act(theirs(maps.double()))
        before = maps.clone()
        given = ours(maps.contiguous(memory_format=layout(len(shape))))
        assert given.is_contiguous(memory_format=layout(len(shape)))
        scale = float(expected.abs().max()) * (1 + offset / 10)  # what rounding leaves of maps far from 0
        torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-6 * scale)
        coarse = ours(maps.bfloat16().contiguous(memory_format=layout(len(shape))))
        assert coarse.dtype == torch.bfloat16
        assert coarse.is_contiguous(memory_format=layout(len(shape)))
        rounded = act(theirs(maps.bfloat16().double()))
        torch.testing.assert_close(coarse.double(), rounded, rtol=0.01, atol=0.01 * scale)
        assert torch.equal(maps, before), "the input was changed"


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (2, 2, 2), (1, 2, 2)])
def test_mean_pool(stride: tuple[int, ...]) -> None:
    inputs = torch.randn((2, 3, *[7] * len(stride)), generator=torch.Generator().manual_seed(0))
    before = inputs.clone()
    reference = nn.AvgPool2d if len(stride) == 2 else nn.AvgPool3d
    torch.testing.assert_close(MeanPool(stride)(inputs), reference(stride, stride)(inputs))
    assert MeanPool(stride)(inputs.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(inputs, before), "the input was changed"


@pytest.mark.parametrize("dims", [2, 3])
def test_session_runs_fused_the_same_for_any_number_of_threads(dims: int) -> None:
    network = unet("PlainConvUNet", dims)
    inputs = windows(dims) if dims == 3 else windows(2)[:, :, None]
    with torch.inference_mode():
        expected = network(windows(dims)).reshape(2, 2, *inputs.shape[2:])
    session = TorchSession(network, dims=dims, device="cpu", probe=(8,) * dims)
    assert session.fused
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(session(inputs))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(answers[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert answers[0].is_contiguous()


def test_a_fused_network_that_fails_is_not_used(monkeypatch, caplog) -> None:
    monkeypatch.setattr(session_torch, "fuse_layers", lambda network: nn.Conv2d(99, 2, 1))
    session = TorchSession(unet("PlainConvUNet", 2), dims=2, device="cpu", probe=(8, 8))
    assert not session.fused
    assert "plain one runs" in caplog.text


def test_bfloat16_leaves_strides_alone_that_skip_voxels() -> None:
    """oneDNN writes beyond its memory there."""
    conv = nn.Conv3d(24, 12, (1, 1, 3), (3, 1, 1), (0, 0, 1))
    fused = fuse_layers(nn.Sequential(conv))
    assert fused is not None
    maps = torch.randn((2, 24, 30, 4, 10), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        given = in_precision(fused, torch.bfloat16)(maps.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(given.float(), conv(maps), rtol=0.01, atol=0.01)


def test_a_fused_network_that_is_wrong_on_this_processor_is_not_used(monkeypatch, caplog) -> None:
    network = unet("PlainConvUNet", 2)

    def slightly_wrong(plain: nn.Module) -> nn.Module | None:
        other = copy.deepcopy(plain)
        next(layer for layer in other.modules() if isinstance(layer, nn.BatchNorm2d)).eps = 0.1
        return fuse_layers(other)

    monkeypatch.setattr(session_torch, "fuse_layers", slightly_wrong)
    session = TorchSession(network, dims=2, device="cpu", probe=(8, 8))
    assert not session.fused
    assert "plain one runs" in caplog.text
    inputs = windows(2)
    with torch.inference_mode():
        torch.testing.assert_close(session(inputs[:, :, None]).squeeze(2), network(inputs))


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_bfloat16_is_close_and_only_on_request(kind: str) -> None:
    network, inputs = unet(kind, 3), windows(3)
    exact = TorchSession(network, dims=3, device="cpu", probe=(8, 8, 8))(inputs)
    coarse = TorchSession(network, dims=3, device="cpu", precision="bf16", probe=(8, 8, 8))(inputs)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    assert float((coarse - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def in_bfloat16(conv: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    fused = fuse_layers(nn.Sequential(conv))
    assert fused is not None
    with torch.inference_mode():
        result: torch.Tensor = in_precision(fused, torch.bfloat16)(maps.contiguous(memory_format=layout(2)))
    return result


def convolution(inputs: int, outputs: int, size: int, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


@torch.inference_mode()
def test_what_is_exact_in_bfloat16() -> None:
    """Numbers that bfloat16 rounds away (it has 8 binary digits), in the places that are held exactly."""
    detail = 1 + 2**-12

    few = convolution(2, 16, 3)  # a difference of inputs that round to the same, then of weights that do
    few.weight[:, 0, 1, 1], few.weight[:, 1, 1, 1] = 1, -1
    inputs = torch.tensor([detail, 1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    assert torch.equal(in_bfloat16(few, inputs), torch.full((1, 16, 8, 8), 2**-12, dtype=torch.bfloat16))
    few.weight[:, 0, 1, 1] = detail
    assert torch.equal(
        in_bfloat16(few, torch.ones(1, 2, 8, 8)), torch.full((1, 16, 8, 8), 2**-12, dtype=torch.bfloat16)
    )

    pointwise = convolution(32, 2, 1)  # a network's last: its result stays float32
    pointwise.weight[:, 0] = detail
    assert torch.equal(in_bfloat16(pointwise, torch.ones(1, 32, 8, 8)), torch.full((1, 2, 8, 8), detail))

    biased = convolution(32, 32, 3)  # 1/256 + (1 + 1/512) rounds up, 1/256 + 1 rounds down
    biased.weight[range(32), range(32), 1, 1] = 1
    biased.bias[:] = 1 + 2**-9  # type: ignore[index]
    given = in_bfloat16(biased, torch.full((1, 32, 8, 8), 2**-8))
    assert torch.equal(given, torch.full((1, 32, 8, 8), 1 + 2**-7, dtype=torch.bfloat16))

    grouped = convolution(4, 16, 3, groups=2)
    grouped.weight[:, :, 1, 1] = 1
    assert torch.equal(in_bfloat16(grouped, torch.ones(1, 4, 8, 8)), torch.full((1, 16, 8, 8), 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_bfloat16_is_nearer_than_rounding_everything(kind: str, dims: int) -> None:
    network = unet(kind, dims)
    inputs = windows(3) if dims == 3 else windows(2)[:, :, None]
    exact = TorchSession(network, dims=dims, device="cpu", probe=(8,) * dims)(inputs)
    coarse = TorchSession(network, dims=dims, device="cpu", precision="bf16", probe=(8,) * dims)(inputs)
    with torch.inference_mode():
        rounded = replace_pools(network.bfloat16())(windows(dims).bfloat16()).float().reshape(exact.shape)
    assert float((coarse - exact).abs().mean()) < 0.7 * float((rounded - exact).abs().mean())


@pytest.mark.parametrize("dims", [2, 3])
def test_held_weights_compute_what_autocast_does(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_torch, "fuse_layers", lambda network: None)
    network = unet("PlainConvUNet", dims, "InstanceNorm")
    inputs = windows(3) if dims == 3 else windows(2)[:, :, None]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(windows(dims)).float()
    if dims == 2:
        expected = expected[:, :, None]
    exact = TorchSession(copy.deepcopy(network), dims=dims, device="cpu")(inputs)
    session = TorchSession(network, dims=dims, device="cpu", precision="bf16")
    kernels = {layer.weight.dtype for layer in session.network.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)}
    assert kernels == {torch.bfloat16}
    scale = float(exact.abs().max())
    assert float((expected - exact).abs().max()) < 0.1 * scale
    assert float((session(inputs) - exact).abs().max()) < 0.1 * scale
    assert float((session(inputs) - expected).abs().max()) < 0.1 * scale


def test_residual_networks_run_in_bfloat16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch pools no bfloat16 volumes there."""
    monkeypatch.setattr(session_torch, "fuse_layers", lambda network: None)
    network, inputs = unet("ResidualEncoderUNet", 3, "InstanceNorm"), windows(3)
    exact = TorchSession(copy.deepcopy(network), dims=3, device="cpu")(inputs)
    coarse = TorchSession(network, dims=3, device="cpu", precision="bf16")(inputs)
    assert float((coarse - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_quick_session_is_coarser_only_where_the_hardware_is_faster(monkeypatch) -> None:
    session = TorchSession(unet("PlainConvUNet", 2), dims=2, device="cpu", probe=(8, 8))
    monkeypatch.setattr(session_torch, "has_fast_bfloat16", lambda device: True)
    assert session.reduced_precision.precision == "bf16"
    assert session.precision == "fp32"
    assert session.reduced_precision is session.reduced_precision
    shared = [
        [layer._weights for layer in one.network.modules() if isinstance(layer, FusedConvolution)]
        for one in (session, session.reduced_precision)
    ]
    assert shared[0]
    assert all(first is second for first, second in zip(*shared, strict=True)), "weights are held twice"
    monkeypatch.setattr(session_torch, "has_fast_bfloat16", lambda device: False)
    session = TorchSession(unet("PlainConvUNet", 2), dims=2, device="cpu", probe=(8, 8))
    assert session.reduced_precision is session
    monkeypatch.setattr(session_torch, "fuse_layers", lambda network: None)
    plain = TorchSession(unet("PlainConvUNet", 2), dims=2, device="cpu")
    assert plain.reduced_precision is plain
    assert not has_fast_bfloat16(torch.device("cuda"))
    assert not has_bfloat16(torch.device("cuda"))
    assert has_bfloat16(torch.device("cpu")) or not has_fast_bfloat16(torch.device("cpu"))


def test_precision_by_device() -> None:
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    assert resolve_precision("bf16", torch.device("cuda")) == "bf16"
    with pytest.raises(UsageError, match="fp16"):
        resolve_precision("fp16", CPU)
