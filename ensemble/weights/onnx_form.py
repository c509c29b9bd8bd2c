"""The ONNX form of a network beside its packed weights, with the probe on which it must agree with PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch

from ensemble.errors import UsageError, WeightsBroken
from ensemble.files import error_in_words
from ensemble.inference.export import export_to_onnx
from ensemble.inference.parity import MAX_DIFFERENCE, MIN_DICE, Probe, check_parity, make_probe
from ensemble.inference.session_onnx import OnnxSession
from ensemble.memory import is_out_of_memory
from ensemble.weights.packed import SUFFIX, read_packed, write_packed

NETWORK, PROBE = "network.onnx", f"probe{SUFFIX}"
_WITHOUT, _INSTEAD = "pack without --onnx", "use --session torch, or pack the member again"


def write_onnx(
    network: torch.nn.Module, channels: int, smallest_window: tuple[int, ...], folder: Path, source: Path
) -> None:
    """Write a network as ONNX (any batch and window size), with a probe: a test input and PyTorch's output.

    Then check the ONNX file on the probe. Raises WeightsBroken if ONNX Runtime's output differs from PyTorch's, or if no probe can be
    made; UsageError if the exporter is missing. `source` is the folder of the member that is packed, for errors.
    """
    try:
        probe = make_probe(network, channels, smallest_window)
    except ValueError as error:
        raise WeightsBroken(
            "an ONNX export of this network could not be checked, so none is written",
            where=source,
            found=str(error),
            do=_WITHOUT,
        ) from error
    try:
        (folder / NETWORK).write_bytes(export_to_onnx(network, channels, smallest_window).onnx)
    except (ModuleNotFoundError, torch.onnx.errors.OnnxExporterError) as error:
        if not isinstance(error, ModuleNotFoundError) and "onnx" not in str(error).lower():
            raise
        raise UsageError(
            "members pack --onnx could not export a network",
            where=source,
            found=error_in_words(error)[:200],
            do=f"run pip install onnx, or {_WITHOUT}",
        ) from error
    write_packed(folder / PROBE, {"window": probe.window, "foreground": probe.foreground}, {}, "fp32")
    try:
        open_onnx(folder, len(smallest_window), torch.device("cpu"), "onnx")
    except (
        WeightsBroken
    ) as error:  # its place is a temporary one, and there is nothing packed yet to use another session with
        raise WeightsBroken(error.what, where=source, found=error.found, do=_WITHOUT) from error


def open_onnx(folder: Path, dims: int, device: torch.device, engine: str) -> OnnxSession:
    """Return the ONNX session of a fold's folder if it passes the parity gate.

    Raises WeightsBroken if it fails, or if its files are missing or damaged.
    """
    session = OnnxSession(
        folder / NETWORK, dims=dims, device=device, engine="tensorrt" if engine == "tensorrt" else "onnx"
    )
    tensors, _ = read_packed(folder / PROBE)
    try:
        probe = Probe(tensors["window"], tensors["foreground"])
        parity = check_parity(session, probe)
    except (KeyError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise WeightsBroken(
            "the test input (probe) for a network's ONNX file is damaged",
            where=folder / PROBE,
            found=str(error)[:200],
            do=_INSTEAD,
        ) from error
    if not parity.passed or not (probe.foreground > 0.5).any():
        raise WeightsBroken(
            "a network's ONNX file gives another output than PyTorch does, on the test input (probe) stored beside it",
            where=folder / NETWORK,
            found=f"probabilities up to {parity.difference:.2g} apart (at most {MAX_DIFFERENCE:g} is accepted), Dice of the masks"
            f" {parity.dice:.4f} (at least {MIN_DICE:g})",
            do=_INSTEAD,
        )
    return session
