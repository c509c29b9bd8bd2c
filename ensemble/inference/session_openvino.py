"""A network run by OpenVINO, on the CPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any
from weakref import ref

import torch

from ensemble.inference.export import export_to_onnx
from ensemble.inference.precision import ResolvedPrecision
from ensemble.memory import is_out_of_memory

log = logging.getLogger(__name__)

#: Largest difference of logits from PyTorch's, relative to their range; 1e-6 was measured.
TOLERANCE = 1e-4
#: Networks of a process that work on several threads. Each keeps two of its own, and platforms allow as few as 128; later ones work on one.
MAX_WITH_THREADS = 24
_HINTS = {"fp32": "f32", "bf16": "bf16"}
#: Modules that `import openvino` would import for model conversion and telemetry.
_TELLS = "openvino.tools.ovc"


#: Sessions that compute on several threads. Plain references, since the callbacks of a WeakSet log errors when the process is ending.
_WITH_THREADS: list[ref[OpenVinoSession]] = []


class OpenVinoSession:
    """Runs a 2-D or 3-D network on as many threads as PyTorch may use; the result does not depend on their number."""

    device = torch.device("cpu")

    def __init__(self, onnx: bytes, *, dims: int, precision: ResolvedPrecision = "fp32", tap: str = "") -> None:
        """Raises what OpenVINO raises for a network that it can't run. `tap` names the layer that a second output tells of."""
        self.dims, self.tap = dims, tap
        # the network is held once: as the CPU's code wants it
        self._compiled = _core().compile_model(
            _core().read_model(onnx),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1 if self._claim_threads() else 0,  # with 0 only the calling thread computes
                "ENABLE_CPU_PINNING": False,  # other processes have their threads, too
            },
        )
        self.precision = (
            "bf16" if self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "bf16" else "fp32"
        )
        self._request = self._compiled.create_infer_request()

    def _claim_threads(self) -> bool:
        """Claim threads for this network. Returns False if there is one only, or `MAX_WITH_THREADS` networks have claimed theirs."""
        _WITH_THREADS[:] = [session for session in _WITH_THREADS if session() is not None]
        if torch.get_num_threads() == 1 or len(_WITH_THREADS) >= MAX_WITH_THREADS:
            return False
        _WITH_THREADS.append(ref(self))
        return True

    @property
    def arithmetic(self) -> str:
        """Precision and runtime."""
        return f"{self.precision}, OpenVINO"

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) float32 of windows (N, C, Z, Y, X) float32, on the CPU; Z = 1 for 2-D networks."""
        return self._answers(windows)[0]

    def tapped(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, and the tapped layer's maps (N, D, z, y, x)."""
        logits, maps = self._answers(windows)
        return logits, maps

    def _answers(self, windows: torch.Tensor) -> list[torch.Tensor]:
        inputs = windows.squeeze(2) if self.dims == 2 else windows
        answers = self._request.infer([inputs.contiguous().numpy()], share_inputs=True)
        self._compiled.release_memory()  # of activations, which each network would keep for itself
        outputs = [torch.from_numpy(answers[number]) for number in range(2 if self.tap else 1)]
        return [output.unsqueeze(2) for output in outputs] if self.dims == 2 else outputs


def open_openvino_session(
    network: torch.nn.Module, channels: int, window: Sequence[int], precision: ResolvedPrecision, tap: str = ""
) -> OpenVinoSession | None:
    """Return a session on the CPU if its logits for a small window (y, x or z, y, x) equal PyTorch's; otherwise log this and return None.

    `tap` names the layer whose maps it returns in addition to the logits.
    """
    dims = len(window)
    try:
        exported = export_to_onnx(network.eval(), channels, window, tap)
        session = OpenVinoSession(exported.onnx, dims=dims, tap=tap)
        windows = exported.windows if dims == 3 else exported.windows.unsqueeze(2)
        expected = [exported.logits] if exported.features is None else [exported.logits, exported.features]
        given = session.tapped(windows) if tap else [session(windows)]
        apart = max(map(_apart, given, expected))
        if apart <= TOLERANCE:
            if precision == "fp32":
                return session
            return OpenVinoSession(exported.onnx, dims=dims, precision=precision, tap=tap)
        why = f"its {'answers' if tap else 'logits'} differ by {apart:.1g} of their range"
    except Exception as error:  # exporter and runtime have no class of errors in common
        if is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if tap:
        log.warning("OpenVINO's features of a network differ from PyTorch's (%s); trying without features", why)
    else:
        log.warning("OpenVINO's output for a network differs from PyTorch's (%s); using PyTorch in float32", why)
    return None


def _apart(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the range of the values."""
    return float((given.reshape(expected.shape) - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> ModuleType:
    """Import OpenVINO without its tools, which would import openvino_telemetry and contact its makers' server."""
    missing = object()
    before = sys.modules.get(_TELLS, missing)
    if before is missing:
        sys.modules[_TELLS] = None  # type: ignore[assignment]  # as Python has it: it can't be imported
    try:
        import openvino
    finally:
        if before is missing:
            del sys.modules[_TELLS]
    return openvino
