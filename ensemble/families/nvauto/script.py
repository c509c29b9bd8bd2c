"""TorchScript is code: decide whether it may be loaded, and run it as a session."""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.families.nvauto.folder import SCRIPT_SUFFIX
from ensemble.families.spec import MemberSpec
from ensemble.files import error_in_words, open_file, size_in_words
from ensemble.inference.device import reproducible_arithmetic
from ensemble.inference.precision import DTYPES, ResolvedPrecision
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.program import command_line
from ensemble.weights.folder import convert_folder_errors

log = logging.getLogger(__name__)

#: A small window (x, y, z), on which half precision is tried.
_PROBE = (64, 64, 64)


def refuse_untrusted_torchscript(spec: MemberSpec, files: list[Path], settings: InferenceSettings) -> None:
    """Raise WeightsBroken for TorchScript that the user did not allow and no manifest lists with its SHA-256 (docs/adr/0018)."""
    scripts = [path for path in files if path.suffix == SCRIPT_SUFFIX]
    named = spec.sha256 if spec.listed else {}
    unnamed = [path.name for path in scripts if path.relative_to(spec.folder).as_posix() not in named]
    if not unnamed or settings.allow_torchscript:
        return
    raise WeightsBroken(
        f"member {spec.name} was not loaded, because TorchScript is code",
        where=spec.folder,
        found=f"not listed with a sha256 in a manifest.json: {', '.join(unnamed)}",
        do=f"turn it into files without code: {command_line('members pack SRC DST')}; or, if you trust who made it, allow it:"
        " --allow-torchscript (ISLES_ALLOW_TORCHSCRIPT=1), or a manifest.json that lists its files with their sha256;"
        " or exclude the member (--members)",
    )


class TorchScriptSession:
    """Runs a TorchScript network, whose weights are float32. Lower precisions use autocast; if that fails, float32 is used."""

    #: The text if the layers are not known.
    tap = ""

    def __init__(self, path: Path, *, channels: int, device: torch.device, precision: ResolvedPrecision) -> None:
        """Raises WeightsBroken for a file that PyTorch can't load."""
        self.device, self.precision = device, precision
        try:
            with convert_folder_errors(path), open_file(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = torch.jit.load(file, map_location=device).eval()
        except (RuntimeError, ValueError, EOFError) as error:
            if is_out_of_memory(error):
                raise WeightsBroken(
                    f"there is not enough memory to load the TorchScript network {path.name}",
                    where=path,
                    found=size_in_words(path),
                    do=MORE_MEMORY,
                ) from error
            raise WeightsBroken(
                "a TorchScript network can't be loaded",
                where=path,
                found=error_in_words(error).splitlines()[0][:200],
                do="copy or download it again",
            ) from error
        if precision != "fp32" and not self._works(channels):
            log.warning("%s: does not work in %s, it runs in float32", path.name, precision)
            self.precision = "fp32"

    @property
    def arithmetic(self) -> str:
        """Precision and runtime."""
        return f"{self.precision}, TorchScript"

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K, X, Y, Z) float32 of windows (N, C, X, Y, Z) float32, on the device of the windows."""
        lower = self.precision != "fp32"
        casting = torch.autocast(self.device.type, DTYPES[self.precision]) if lower else nullcontext()
        with torch.inference_mode(), reproducible_arithmetic(self.device), casting:
            logits = self._network(windows.to(self.device).contiguous())
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"a TorchScript network gives {type(logits).__name__}, one tensor of logits is expected")
        return logits.to(device=windows.device, dtype=torch.float32)

    def _works(self, channels: int) -> bool:
        try:
            answer = self(torch.zeros(1, channels, *_PROBE, device=self.device))
            return bool(torch.isfinite(answer).all())
        except RuntimeError:
            return False
