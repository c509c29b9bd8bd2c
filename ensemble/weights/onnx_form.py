"""The ONNX form of a network beside its packed weights, with the probe on which it must agree with PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch

from ensemble.errors import UsageError, WeightsBroken
from ensemble.files import error_in_words
from ensemble.inference.export import export
from ensemble.inference.parity import Probe, compare, make_probe
from ensemble.inference.session_onnx import OnnxSession
from ensemble.memory import is_out_of_memory
from ensemble.weights.packed import SUFFIX, read_packed, write_packed

NETWORK, PROBE = "network.onnx", f"probe{SUFFIX}"


def write_onnx(network: torch.nn.Module, channels: int, smallest_window: tuple[int, ...], folder: Path) -> None:
    """Export a network for batches and windows of any size, and a probe; then check the export against the probe.

    Raises WeightsBroken if ONNX Runtime gives another mask, UsageError where the exporter is missing.
    """
    try:
        probe = make_probe(network, channels, smallest_window)
    except ValueError as error:
        raise WeightsBroken(
            "an ONNX export of this network could not be checked, so none is written",
            where=folder,
            found=str(error),
            do="pack without --onnx",
        ) from error
    try:
        (folder / NETWORK).write_bytes(export(network, channels, smallest_window).onnx)
    except (ModuleNotFoundError, torch.onnx.errors.OnnxExporterError) as error:
        if not isinstance(error, ModuleNotFoundError) and "onnx" not in str(error).lower():
            raise
        raise UsageError(
            "members pack --onnx could not export a network",
            found=error_in_words(error)[:200],
            do="run pip install onnx, or remove --onnx",
        ) from error
    write_packed(folder / PROBE, {"window": probe.window, "foreground": probe.foreground}, {}, "fp32")
    open_onnx(folder, len(smallest_window), torch.device("cpu"), "onnx")


def open_onnx(folder: Path, dims: int, device: torch.device, engine: str) -> OnnxSession:
    """Return the ONNX session of a fold's folder if it passes the parity gate. Raises WeightsBroken if it fails."""
    session = OnnxSession(
        folder / NETWORK, dims=dims, device=device, engine="tensorrt" if engine == "tensorrt" else "onnx"
    )
    tensors, _ = read_packed(folder / PROBE)
    try:
        probe = Probe(tensors["window"], tensors["foreground"])
        parity = compare(session, probe)
    except (KeyError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise WeightsBroken(
            "the probe for a network's ONNX file is damaged", where=folder / PROBE, found=str(error)[:200]
        ) from error
    if not parity.passed or not (probe.foreground > 0.5).any():
        raise WeightsBroken(
            "the ONNX file of a network gives a different mask from the packed network",
            where=folder / NETWORK,
            found=f"probabilities up to {parity.difference:.2g} apart, Dice of the masks {parity.dice:.4f}",
            do="use --session torch, or pack the member again",
        )
    return session
