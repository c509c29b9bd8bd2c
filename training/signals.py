"""Signal equations: what a scanner measures for given tissue parameters and protocol."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.draw import Draw
from training.tissues import ParameterMaps

SMALLEST_SIGNAL = 1e-4


@dataclass(frozen=True)
class DiffusionProtocol:
    """Spin-echo EPI with diffusion weighting."""

    b_s_per_mm2: float = 1000.0
    te_ms: float = 85.0
    tr_ms: float = 5000.0
    directions: int = 3  # images averaged into the trace


@dataclass(frozen=True)
class FlairProtocol:
    """Fluid-attenuated inversion recovery."""

    te_ms: float = 100.0
    tr_ms: float = 9000.0
    ti_ms: float = 2500.0


def spin_echo(maps: ParameterMaps, te_ms: float, tr_ms: float) -> Tensor:
    """S0 = PD (1 - exp(-TR/T1)) exp(-TE/T2) (Bernstein et al., Handbook of MRI Pulse Sequences, 2004)."""
    return maps.proton_density * (1 - torch.exp(-tr_ms / maps.t1_ms)) * torch.exp(-te_ms / maps.t2_ms)


def diffusion_attenuation(adc: Tensor, b_s_per_mm2: float) -> Tensor:
    """exp(-b ADC) with ADC in 1e-3 mm^2/s (Stejskal & Tanner, 1965)."""
    return torch.exp(-b_s_per_mm2 * 1e-3 * adc)


def inversion_recovery(maps: ParameterMaps, protocol: FlairProtocol) -> Tensor:
    """|S| of FLAIR: PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2) (Hajnal et al., JCAT 1992)."""
    recovery = 1 - 2 * torch.exp(-protocol.ti_ms / maps.t1_ms) + torch.exp(-protocol.tr_ms / maps.t1_ms)
    return maps.proton_density * recovery.abs() * torch.exp(-protocol.te_ms / maps.t2_ms)


def rician(signal: Tensor, sigma: float, draw: Draw, averages: int = 1) -> Tensor:
    """Magnitude of the signal with complex Gaussian noise of standard deviation `sigma`, averaged over `averages` magnitude images.

    Gudbjartsson & Patz, Magn Reson Med 1995. Without signal the mean is sigma * sqrt(pi / 2): the noise floor.
    """
    total = torch.zeros_like(signal)
    for _ in range(averages):
        real = signal + sigma * draw.randn(signal.shape)
        imaginary = sigma * draw.randn(signal.shape)
        total += torch.sqrt(real * real + imaginary * imaginary)
    return total / averages


def adc_from_signals(b0: Tensor, dwi: Tensor, b_s_per_mm2: float) -> Tensor:
    """ADC map in 1e-3 mm^2/s as scanners compute it: ln(S_0 / S_b) / b, from the measured (noisy) images; may be negative."""
    ratio = b0.clamp_min(SMALLEST_SIGNAL) / dwi.clamp_min(SMALLEST_SIGNAL)
    return torch.log(ratio) / (b_s_per_mm2 * 1e-3)
