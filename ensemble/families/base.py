"""What every member is, and every family of members. Imports no torch.

A member is weights that turn a prepared case into a lesion probability on the DWI grid. A family is all that is known of weights of one
kind: how they are found in a folder, described, loaded, packed, how their networks are built, and what memory a window takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ensemble.config import Precision, RunConfig, SessionKind, Tta
from ensemble.errors import UsageError
from ensemble.families.spec import MemberSpec
from ensemble.families.tree import WeightsTree
from ensemble.prepare.case import PreparedCase
from ensemble.types import FloatArray, Modality, ProgressCallback
from ensemble.volume import Volume

if TYPE_CHECKING:
    from torch import nn

    from ensemble.weights import packed


@dataclass(frozen=True)
class InferenceSettings:
    """How networks are run, the same for all members."""

    device: str = "cpu"
    """A torch device: "cpu", "cuda"."""
    tta: Tta = "mirror"
    """Which of the member's own flips are used."""
    precision: Precision = "auto"
    """Arithmetic of the networks."""
    session: SessionKind = "auto"
    """What runs the networks."""
    allow_torchscript: bool = False
    """Whether code in weights may run although no manifest names its file by digest."""

    @property
    def packed_form(self) -> bool:
        """Whether networks run in the ONNX form that they were packed in."""
        return self.session in ("onnx", "tensorrt")

    @classmethod
    def of(cls, config: RunConfig, device: str) -> InferenceSettings:
        """Those of a run, on a torch device."""
        return cls(device, config.tta, config.precision, config.session, config.allow_torchscript)


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


@dataclass(frozen=True)
class Part:
    """Tells how far one of several equal parts of the work has come."""

    progress: ProgressCallback
    part: int
    parts: int

    def __call__(self, done: int, total: int) -> None:
        self.progress(self.part * total + done, self.parts * total)


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


@dataclass(frozen=True)
class Unsupported:
    """Weights that were recognised, and can't be used yet."""

    name: str
    folder: Path
    what: str


@dataclass(frozen=True)
class Shown:
    """What a member's cheap files say of its networks."""

    channels: tuple[str, ...]
    """What each input channel is called."""
    spacing_mm: tuple[float, ...]
    """That they work at; in-plane for 2-D networks."""
    published: int = 0
    """How many folds were published, where that is known: each that is not there is said."""
    remarks: tuple[str, ...] = ()
    """What is missing of what was published, where folds alone don't tell it."""


@dataclass(frozen=True)
class Network:
    """One network of a member (that of a fold), before it is built."""

    weights: Path
    """Its file; its form in ONNX lies beside it."""
    channels: int
    spacing_mm: tuple[float, ...]
    """That it works at; two axes for 2-D networks."""
    patch: tuple[int, ...]
    """Its window, as many axes."""
    smallest_window: tuple[int, ...]
    """A small window that it can take, as many axes."""
    window_bytes: int
    """Memory that the activations of one window take."""
    memory_of: str
    """What makes them so large, for messages."""
    build: Callable[[], nn.Module]
    """Gives the network with its weights. Raises WeightsBroken."""


class Peer(Protocol):
    """The program that weights of a kind come from, running them itself."""

    @property
    def title(self) -> str:
        """Its name and version."""

    def probability(self, member: Member, case: PreparedCase, settings: InferenceSettings) -> FloatArray:
        """Lesion probability (z, y, x) on the DWI grid, of what the member is given. Raises what the peer raises."""


class Discovery(Protocol):
    """What recognises weights of one kind by the layout of their files."""

    @property
    @abstractmethod
    def suffixes(self) -> frozenset[str]:
        """Endings of its files that bear on what they predict, besides `registry.PACKED_SUFFIXES`."""

    @abstractmethod
    def discover(self, tree: WeightsTree) -> Iterable[MemberSpec | Unsupported]:
        """The members in a weights folder, and what is known and can't be used yet. Raises WeightsBroken."""


class Family(Discovery, Protocol):
    """All that is known of one kind of members. A row of `registry.FAMILIES` makes it one of the product's."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The manifest's word for it."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """Which folders are recognised, for messages."""

    @abstractmethod
    def folds(self, folder: Path) -> tuple[str, ...]:
        """Names of a member's folds: "0", "1", ... or "all"."""

    @abstractmethod
    def describe(self, folder: Path) -> Shown:
        """What the cheap files of a member's folder say. Raises WeightsBroken."""

    @abstractmethod
    def load(self, spec: MemberSpec, settings: InferenceSettings) -> Member:
        """A member with its networks on the device. Raises WeightsBroken for what is missing, damaged or not supported."""

    @abstractmethod
    def networks(self, folder: Path) -> Sequence[Network]:
        """The networks of a member's folder, packed or not. Raises WeightsBroken."""

    def pack(self, source: Path, target: Path, precision: packed.Precision) -> None:
        """Write a member's folder without pickles and optimizer states. Raises WeightsBroken; UsageError where there is no such form."""
        raise UsageError(f"members of kind {self.kind} can't be packed", where=source, do="use the folder as it is")

    def peer(self) -> Peer | None:
        """The program that these weights come from, to compare with; None where there is none. Raises UsageError if it is not installed."""
        return None
