"""A network in ONNX form, run by ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from ensemble.errors import WeightsBroken
from ensemble.inference.export import INPUT, OUTPUT
from ensemble.memory import is_out_of_memory

log = logging.getLogger(__name__)

#: Execution providers by device and engine, the wanted one first.
_PROVIDERS = {
    ("cpu", "onnx"): ["CPUExecutionProvider"],
    ("cuda", "onnx"): ["CUDAExecutionProvider", "CPUExecutionProvider"],
    ("cuda", "tensorrt"): ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
#: float32 means float32: ONNX Runtime permits TF32 on CUDA by default.
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


class OnnxSession:
    """Runs an ONNX file of a network of two or three spatial dimensions; float32, deterministic kernels."""

    #: Packed files hold the logits alone.
    tap = ""

    def __init__(
        self, path: Path, *, dims: int, device: str | torch.device, engine: Literal["onnx", "tensorrt"] = "onnx"
    ) -> None:
        """Raises WeightsBroken if the file is missing, or ONNX Runtime can't load it."""
        import onnxruntime

        self.device, self.dims = torch.device(device), dims
        wanted = _PROVIDERS.get((self.device.type, engine), _PROVIDERS["cpu", "onnx"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        if not path.is_file():
            raise WeightsBroken(
                "a network has no ONNX file",
                where=path,
                found="no such file",
                do="pack the member again with the command members pack SRC DST --onnx, or use --session torch",
            )
        try:
            # from bytes: an .onnx file may name other files as its data, and those would not be verified
            self._session: Any = onnxruntime.InferenceSession(
                path.read_bytes(), options, wanted, [_PROVIDER_OPTIONS.get(provider, {}) for provider in wanted]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            if is_out_of_memory(error):
                raise
            raise WeightsBroken(
                "the ONNX file of a network can't be loaded",
                where=path,
                found=f"{type(error).__name__}: {error}"[:200],
                do="use --session torch, or pack the member again",
            ) from error
        if (got := self._session.get_providers()[0]) != wanted[0]:
            log.warning("ONNX Runtime runs %s with %s, because %s is not available", path.name, got, wanted[0])

    @property
    def arithmetic(self) -> str:
        """Precision and runtime."""
        return f"fp32, {self._session.get_providers()[0]}"

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) float32 of windows (N, C, Z, Y, X) float32, on the device of the windows; Z = 1 for 2-D networks."""
        inputs = windows.squeeze(2) if self.dims == 2 else windows
        (answer,) = self._session.run([OUTPUT], {INPUT: inputs.contiguous().cpu().numpy()})
        logits = torch.from_numpy(answer)
        return (logits.unsqueeze(2) if self.dims == 2 else logits).to(windows.device)
