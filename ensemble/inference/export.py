"""Export a network to ONNX, for runtimes other than PyTorch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

INPUT, OUTPUT, FEATURES = "windows", "logits", "features"
_OPSET = 17
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class OnnxExport:
    """A network in ONNX form for batches and windows of any size, and PyTorch's outputs on the window used for tracing."""

    onnx: bytes
    windows: torch.Tensor
    """(2, C, y, x) or (2, C, z, y, x), noise."""
    logits: torch.Tensor
    """(2, K, ...)."""
    features: torch.Tensor | None = None
    """(2, D, ...), of the layer that is tapped."""


class TappedNetwork(torch.nn.Module):
    """A network that also returns the output of one of its layers (dotted name). Raises AttributeError for an unknown layer."""

    def __init__(self, network: torch.nn.Module, tap: str) -> None:
        super().__init__()
        self.network, self._layer = network, network.get_submodule(tap)

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and the layer's maps."""
        maps: list[torch.Tensor] = []
        watching = self._layer.register_forward_hook(lambda _layer, _inputs, answer: maps.append(answer))
        try:
            logits = self.network(windows)
        finally:
            watching.remove()
        return logits, maps[-1]


class EncoderOnly(torch.nn.Module):
    """The encoder of a network alone: the maps of its stages, up to the one that `tap` names ("encoder.stages.4": stages 0 to 4)."""

    def __init__(self, network: torch.nn.Module, tap: str) -> None:
        super().__init__()
        stages, _, last = tap.rpartition(".")
        self.network = network
        self._stages = [network.get_submodule(f"{stages}.{number}") for number in range(int(last) + 1)]

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the maps of each stage; nothing after the last stage is computed."""
        maps: list[torch.Tensor] = []

        def note(_layer: torch.nn.Module, _inputs: object, answer: torch.Tensor) -> None:
            maps.append(answer)
            if len(maps) == len(self._stages):
                raise _AllTold

        watching = [stage.register_forward_hook(note) for stage in self._stages]
        try:
            self.network(windows)
        except _AllTold:
            pass
        finally:
            for watched in watching:
                watched.remove()
        return tuple(maps)


class _AllTold(Exception):
    """The encoder's last stage has answered."""


class _Branched(TappedNetwork):
    """Returns the layer's maps through an identity convolution (products of 1 and 0 are exact in bfloat16).

    OpenVINO computes what lies between its last convolution and an output in float32, whatever is asked for: with the maps as an output of
    their own, the logits would differ in bfloat16 from those of the network alone.
    """

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and the layer's maps."""
        logits, maps = super().forward(windows)
        dims, channels = maps.ndim - 2, maps.shape[1]
        same = torch.eye(channels).reshape(channels, channels, *(1,) * dims)
        return logits, (torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d)(maps, same)


def export_to_onnx(network: torch.nn.Module, channels: int, window: Sequence[int], tap: str = "") -> OnnxExport:
    """Export a network (in eval mode) to ONNX, traced on a small window (y, x or z, y, x); a tapped layer becomes a second output.

    PyTorch's older exporter: the newer one needs onnxscript, and gives no better graph for convolutions. Raises what it raises, and
    ValueError for a network that reckons with its window's size, which would be this window's for good.
    """
    axes = dict(zip(range(2, 5), "zyx"[-len(window) :], strict=False))
    windows = torch.randn((2, channels, *window), generator=torch.Generator().manual_seed(0))
    file, answers = io.BytesIO(), []
    traced, outputs = (_Branched(network, tap), [OUTPUT, FEATURES]) if tap else (network, [OUTPUT])
    watching = traced.register_forward_hook(lambda _network, _inputs, answer: answers.append(answer))
    shapes = {INPUT: {0: "n", **axes}, OUTPUT: {0: "n", **axes}}
    if tap:
        shapes[FEATURES] = {0: "n", **{axis: f"{name} of a map" for axis, name in axes.items()}}
    try:
        with _summed_in_parts(network), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.onnx.export(
                traced,
                (windows,),
                file,  # type: ignore[arg-type]  # it takes what can be written to
                dynamo=False,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_axes=shapes,
                opset_version=_OPSET,
            )
    finally:
        watching.remove()
    for warning in seen:  # other warnings: deprecation, and input sizes used by PyTorch's own layers
        if issubclass(warning.category, torch.jit.TracerWarning) and not Path(warning.filename).is_relative_to(_TORCH):
            raise ValueError(f"it depends on the size of its window ({warning.filename}, line {warning.lineno})")
    logits, features = answers[-1] if tap else (answers[-1], None)
    return OnnxExport(file.getvalue(), windows, logits.detach(), None if features is None else features.detach())


@contextmanager
def _summed_in_parts(network: torch.nn.Module) -> Iterator[None]:
    """While it is entered, normalisations over a window are written out: runtimes that know them add up a map of a million voxels in one
    float32 (OpenVINO's is 2e-4 off for 96^3 voxels, this 3e-7).
    """
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.GroupNorm | _InstanceNorm)]
    for norm in norms:
        norm.forward = partial(_normalised, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normalised(norm: torch.nn.GroupNorm | _InstanceNorm, maps: torch.Tensor) -> torch.Tensor:
    """Compute an instance or group normalisation of (N, C, ...), summed row by row."""
    ones = (1, -1, *[1] * (maps.ndim - 2))

    def mean(values: torch.Tensor) -> torch.Tensor:
        inner = values.mean(-1, keepdim=True)
        for axis in range(values.ndim - 2, 1, -1):  # sums: means of means would be put together again
            inner = inner.sum(axis, keepdim=True) / values.shape[axis]
        if isinstance(norm, torch.nn.GroupNorm):
            grouped = inner.unflatten(1, (norm.num_groups, -1))
            inner = grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1, 2)
        return inner

    centred = maps - mean(maps)
    scale = 1 / torch.sqrt(mean(centred * centred) + norm.eps)
    if norm.weight is None:
        return centred * scale
    return centred * (scale * norm.weight.view(ones)) + norm.bias.view(ones)
