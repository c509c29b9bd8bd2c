"""Open a member's networks as sessions on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ensemble.families.base import InferenceSettings, NetworkSpec
from ensemble.families.bounds import refuse_impossible_plans
from ensemble.families.spec import MemberSpec
from ensemble.inference.precision import ResolvedPrecision, has_fast_bfloat16, resolve_precision
from ensemble.inference.session import LoadedSession
from ensemble.inference.session_openvino import open_openvino_session
from ensemble.inference.session_torch import TorchSession
from ensemble.weights.onnx_form import open_onnx

#: Size of the weights' files up to which a member's networks all stay in memory (bytes).
HELD_BYTES = 2**30

Opener = Callable[[NetworkSpec, InferenceSettings], LoadedSession]


def open_sessions(
    spec: MemberSpec, networks: Sequence[NetworkSpec], settings: InferenceSettings
) -> tuple[LoadedSession, ...]:
    """Return one session per network. Raises WeightsBroken before building any network if the plans ask for excessive memory."""
    for network in networks:
        refuse_impossible_plans(spec, network)
    return tuple(open_session(network, settings, tapped=number == 0) for number, network in enumerate(networks))


class SequentialSessions:
    """A member's networks as sessions, run one after the other: kept in memory, or loaded from file each time if they are too large.

    What is held takes as much memory again as its files; `HELD_BYTES` is the limit, which five networks of SEALS' size keep.
    """

    def __init__(self, networks: Sequence[NetworkSpec], open_one: Callable[[NetworkSpec], LoadedSession]) -> None:
        """Opens each network once, so that broken weights are reported before any case. Raises WeightsBroken."""
        self._networks, self._open = networks, open_one
        self._held: list[LoadedSession] = []
        self.streamed = sum(network.weights.stat().st_size for network in networks) > HELD_BYTES
        for network in networks:
            session = open_one(network)
            if not self.streamed:
                self._held.append(session)
        self.device, self.arithmetic = session.device, session.arithmetic

    def __len__(self) -> int:
        return len(self._networks)

    def __iter__(self) -> Iterator[LoadedSession]:
        return iter(self._held) if self._held else map(self._open, self._networks)


def open_sequential_sessions(
    spec: MemberSpec, networks: Sequence[NetworkSpec], settings: InferenceSettings, open_one: Opener | None = None
) -> SequentialSessions:
    """Return sessions for a member whose networks run over an image one after the other. Raises WeightsBroken as `open_sessions` does."""
    for network in networks:
        refuse_impossible_plans(spec, network)
    return SequentialSessions(networks, lambda network: (open_one or open_session)(network, settings))


def open_session(network: NetworkSpec, settings: InferenceSettings, *, tapped: bool = False) -> LoadedSession:
    """Return the session of one network; if `tapped`, with encoder features where settings and runtime allow. Raises WeightsBroken."""
    device, dims = torch.device(settings.device), len(network.patch)
    if settings.packed_form:
        return open_onnx(network.weights.parent, dims, device, settings.session)
    precision = precision_of(settings)
    tap = network.tap if tapped and settings.features else ""
    built = network.build()
    if settings.session == "auto" and device.type == "cpu" and network.convert:
        for layer in dict.fromkeys((tap, "")):  # features must not cost the network what runs it, nor its arithmetic
            session = open_openvino_session(built, network.channels, network.smallest_window, precision, layer)
            if session is not None:
                return session
        precision = "fp32"
    return TorchSession(built, dims=dims, device=device, precision=precision, tap=tap)


def precision_of(settings: InferenceSettings) -> ResolvedPrecision:
    """Return the numerical precision that members run in: the chosen one, or by default float32.

    With gated mirroring, which promises approximate masks only, the default is bfloat16 where the processor is fast at it.
    Raises UsageError if the device lacks the chosen precision.
    """
    device = torch.device(settings.device)
    if settings.tta == "gated" and settings.precision == "auto" and has_fast_bfloat16(device):
        return "bf16"
    return resolve_precision(settings.precision, device)
