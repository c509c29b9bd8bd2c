"""What every member is: weights that turn a prepared case into a lesion probability on the DWI grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ensemble.config import Precision, SessionKind, Tta
from ensemble.inference.session import LoadedSession
from ensemble.prepare.case import PreparedCase
from ensemble.types import Modality, ProgressCallback
from ensemble.volume import Volume


@dataclass(frozen=True)
class InferenceSettings:
    """How networks are run, the same for all members."""

    device: str = "cpu"
    """A torch device: "cpu", "cuda"."""
    tta: Tta = "mirror"
    """Which of the member's own flips are used."""
    precision: Precision = "auto"
    """Arithmetic of the networks."""
    session: SessionKind = "torch"
    """What runs the networks."""


@dataclass(frozen=True)
class MemberPrediction:
    """What a member says of one case."""

    member: str
    probability: Volume
    """Lesion probability, float32 in 0..1, on the DWI grid."""
    networks: int
    """How many networks (folds) were averaged."""
    arithmetic: str = ""
    """In which arithmetic they ran, for the report."""
    remark: str = ""
    """What it had to do without, for the report."""

    @property
    def mask(self) -> Volume:
        """Where it votes lesion (bool): its probability is above 0.5."""
        return self.probability.like(self.probability.array > 0.5)


class Member(Protocol):
    """A loaded member. Networks stay in memory between calls; one call at a time."""

    @property
    def name(self) -> str:
        """The name it votes under."""

    @property
    def requires(self) -> frozenset[Modality]:
        """Images without which it is not applicable."""

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        """Lesion probability on the DWI grid. Raises whatever goes wrong: a member never substitutes a result."""


def fit_for(settings: InferenceSettings, sessions: tuple[LoadedSession, ...]) -> tuple[LoadedSession, ...]:
    """A member's networks; in the fastest arithmetic where mirroring is gated, which promises less, unless a precision was given."""
    if settings.tta == "gated" and settings.precision == "auto":
        return tuple(session.quick for session in sessions)
    return sessions
