"""From a member's networks to sessions on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ensemble.families.base import InferenceSettings, Network
from ensemble.families.bounds import refuse_too_much
from ensemble.families.spec import MemberSpec
from ensemble.inference.precision import resolve_precision
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_torch import TorchSession
from ensemble.weights.onnx_form import open_onnx


def open_sessions(
    spec: MemberSpec, networks: Sequence[Network], settings: InferenceSettings
) -> tuple[LoadedSession, ...]:
    """One session a network. Raises WeightsBroken, before any is built for numbers that no memory holds."""
    for network in networks:
        refuse_too_much(spec, network)
    return tuple(_opened(network, settings) for network in networks)


def fit_for(settings: InferenceSettings, sessions: tuple[LoadedSession, ...]) -> tuple[LoadedSession, ...]:
    """A member's networks; in the fastest arithmetic where mirroring is gated, which promises less, unless a precision was given."""
    if settings.tta == "gated" and settings.precision == "auto":
        return tuple(session.quick for session in sessions)
    return sessions


def _opened(network: Network, settings: InferenceSettings) -> LoadedSession:
    device, dims = torch.device(settings.device), len(network.patch)
    if settings.session != "torch":
        return open_onnx(network.weights.parent, dims, device, settings.session)
    precision = resolve_precision(settings.precision, device)
    built = network.build()
    return TorchSession(built, dims=dims, device=device, precision=precision, probe=network.smallest_window)
